"""The contract between the loop and what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

State = dict[str, Any]  # {"step": int32 [], "params": what inference needs, "training": the rest}
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class TrainTask(Protocol):
    """What the loop runs: a model with its objective and optimizer, as pure functions over `State`.

    Attributes:
      logical_axes: a tuple of logical axes (`lvm.hardware.sharding.RULES`) at each parameter.
    """

    logical_axes: Any

    @property
    def batch_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of the global batch."""

    def init(self, rng: jax.Array) -> State:
        """A fresh state, a pure function of `rng`."""

    def update(self, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """One optimizer step; `metrics` are scalars, with `loss`, `skipped_steps` and `skipped_in_row` among them."""

    def evaluate(self, state: State, stopping: Callable[[], bool]) -> dict[str, float]:
        """Held-out metrics, under the names that `metrics.jsonl` uses; none once `stopping()` says so."""

    def pictures(self, state: State) -> dict[str, np.ndarray]:
        """Named pictures uint8 [H, W, 3] of what the model does now."""


Sums = dict[str, tuple[jax.Array, jax.Array]]  # name → (sum, weight): a mean whose parts can be added up
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Sums]]


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate_steps: int = 1,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """The usual update: gradient, optimizer, new parameters, norms. A gradient that isn't finite changes nothing.

    Args:
      loss_fn: (params, batch, rng) → (total, sums), float32. The loss that is minimised is `total` divided by the
        weight of `sums["loss"]`, both added up over the parts of the batch.
      optimizer: its state is `state["training"]["optimizer"]`.
      schedule: step → learning rate, for the metrics alone.
      accumulate_steps: parts that the batch is cut into, whose gradients are added up one after the other. The
        result is that of the whole batch, to rounding: what is divided by is counted over all of it.

    Returns:
      The update; its metrics are the mean of every sum, `grad_norm`, `param_norm` and `learning_rate`.
    """

    def update(state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        gradients, sums = _gradients(loss_fn, state["params"], batch, rng, accumulate_steps)
        weight = jnp.maximum(sums["loss"][1], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        changes, moments = optimizer.update(gradients, state["training"]["optimizer"], state["params"])
        changed = {"params": optax.apply_updates(state["params"], changes), "optimizer": moments}
        grad_norm = optax.tree.norm(gradients)
        changed, skipped = apply_if_finite(
            jnp.isfinite(grad_norm),
            changed,
            {"params": state["params"], "optimizer": state["training"]["optimizer"]},
            state["training"]["skipped"],
        )
        params = changed["params"]
        metrics = {
            **weighted_means(sums),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
            **skipped,
        }
        training = {"optimizer": changed["optimizer"], "skipped": skipped}
        return {"step": state["step"] + 1, "params": params, "training": training}, metrics

    return update


def init_skip_counts() -> dict[str, jax.Array]:
    """The counts that a fresh state begins with, at `state["training"]["skipped"]`."""
    return {"skipped_steps": jnp.int32(0), "skipped_in_row": jnp.int32(0)}


def apply_if_finite(finite: jax.Array, new: Any, old: Any, skipped: Metrics) -> tuple[Any, Metrics]:
    """`new` and the counts after a good step; `old` and higher counts after one whose gradient is not finite."""
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    missed = 1 - finite.astype(jnp.int32)
    in_row = jnp.where(finite, 0, skipped["skipped_in_row"] + 1)
    return kept, {"skipped_steps": skipped["skipped_steps"] + missed, "skipped_in_row": in_row}


def weighted_means(sums: Sums) -> Metrics:
    """Each sum by its weight. Where there was nothing to weigh it is NaN, but the loss, which is 0."""
    loss, weight = sums["loss"]
    found = {name: total / weight for name, (total, weight) in sums.items()}
    return found | {"loss": loss / jnp.maximum(weight, 1.0)}


def _gradients(
    loss_fn: LossFn, params: Any, batch: Batch, rng: jax.Array, accumulate_steps: int
) -> tuple[Any, Sums]:
    def one(part: Batch, rng: jax.Array) -> tuple[Any, Sums]:
        gradients, sums = jax.grad(loss_fn, has_aux=True)(params, part, rng)
        return gradients, sums

    if accumulate_steps == 1:
        return one(batch, rng)

    def one_by_itself(part: Batch, rng: jax.Array) -> tuple[Any, Sums]:
        # XLA for TPU fails on what it would otherwise do here: move the sum over devices out of the loop.
        return jax.lax.optimization_barrier(one(part, rng))

    def parts(x: jax.Array) -> jax.Array:
        # Every part takes its rows from every device: cut the other way, each would lie on few of them.
        return x.reshape(x.shape[0] // accumulate_steps, accumulate_steps, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one_by_itself(*part)), None

    split = ({name: parts(x) for name, x in batch.items()}, jax.random.split(rng, accumulate_steps))
    first = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, split)
    return total
