"""The contract between the training loop and what it trains, and the update that tasks share."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, Shaped, UInt8

State = dict[str, Any]  # {"step": int32 [], "params": what inference needs, "training": the rest}
Batch = Mapping[str, Any]
Metrics = dict[str, Shaped[Array, ""]]


@runtime_checkable
class TrainTask(Protocol):
    """A model with its objective and optimizer, as pure functions over `State`.

    Attributes:
      logical_axes: a tuple of logical axes (`lvm.hardware.sharding.RULES`) at each parameter.
    """

    logical_axes: Any

    @property
    def batch_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of the global batch."""

    def init(self, rng: Key[Array, ""]) -> State:
        """Returns a fresh state, a pure function of `rng`."""

    def update(self, state: State, batch: Batch, rng: Key[Array, ""]) -> tuple[State, Metrics]:
        """Makes one optimizer step; metrics include `loss`, `skipped_steps` and `skipped_in_row`."""

    def evaluate(self, state: State, stopping: Callable[[], bool]) -> dict[str, float]:
        """Returns held-out metrics, by their names in `metrics.jsonl`; {} once `stopping()`."""

    def pictures(self, state: State) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Returns named pictures of the model's current output."""


@runtime_checkable
class PhasedTask(TrainTask, Protocol):
    """A task with a part that begins at a later step: each phase is compiled to a program of its own.

    A conditional within one program would cost more than its condition: XLA for CPU runs the convolutions in it
    without its library of kernels, ten times as slowly.
    """

    @property
    def last_phase(self) -> int:
        """The phase of the last steps; phases are counted from 0."""

    def phase(self, step: int) -> int:
        """The phase of the update from `step` to the next."""

    def update_in(self, phase: int, state: State, batch: Batch, rng: Key[Array, ""]) -> tuple[State, Metrics]:
        """`update` of a state whose step is of `phase`."""


Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name → (weighted sum, weight), additive over batches
LossFn = Callable[[Any, Batch, Key[Array, ""]], tuple[Float[Array, ""], Sums]]


def make_update(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, accumulate_steps: int = 1
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Makes the usual update: gradient, optimizer, parameters, norms. A non-finite gradient changes nothing.

    Args:
      loss_fn: (params, batch, rng) → (total, sums), float32. The loss that is minimized is `total` divided by the
        weight of `sums["loss"]`, each summed over the micro-batches.
      optimizer: its state is `state["training"]["optimizer"]`.
      schedule: step → learning rate, for the metrics alone.
      accumulate_steps: micro-batches whose gradients are summed one after the other. The result is that of the whole
        batch, to rounding: the weight is counted over all of it.

    Returns:
      The update; its metrics are the mean of every sum, `grad_norm`, `param_norm`, `learning_rate` and skip counts.
    """

    def update(state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        gradients, sums = _gradients(loss_fn, state["params"], batch, rng, accumulate_steps)
        weight = jnp.maximum(sums["loss"][1], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        old = {"params": state["params"], "optimizer": state["training"]["optimizer"]}
        updates, optimizer_state = optimizer.update(gradients, old["optimizer"], old["params"])
        new = {"params": optax.apply_updates(old["params"], updates), "optimizer": optimizer_state}
        grad_norm = optax.tree.norm(gradients)
        new, skipped = apply_if_finite(jnp.isfinite(grad_norm), new, old, state["training"]["skipped"])
        metrics = {
            **weighted_means(sums),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new["params"]),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
            **skipped,
        }
        training = {"optimizer": new["optimizer"], "skipped": skipped}
        return {"step": state["step"] + 1, "params": new["params"], "training": training}, metrics

    return update


def init_skip_counts() -> Metrics:
    """The skip counts of a fresh state, at `state["training"]["skipped"]`."""
    return {"skipped_steps": jnp.int32(0), "skipped_in_row": jnp.int32(0)}


def apply_if_finite(finite: Bool[Array, ""], new: Any, old: Any, skipped: Metrics) -> tuple[Any, Metrics]:
    """Returns `new` if the gradient is `finite`, else `old`; and the updated skip counts."""
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    in_row = jnp.where(finite, 0, skipped["skipped_in_row"] + 1)
    total = skipped["skipped_steps"] + 1 - finite.astype(jnp.int32)
    return kept, {"skipped_steps": total, "skipped_in_row": in_row}


def weighted_means(sums: Sums) -> Metrics:
    """Divides each sum by its weight. With no weight the mean is NaN, but `loss` is 0."""
    loss, weight = sums["loss"]
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return means | {"loss": loss / jnp.maximum(weight, 1.0)}


def _gradients(loss_fn: LossFn, params: Any, batch: Batch, rng: jax.Array, accumulate_steps: int) -> tuple[Any, Sums]:
    def gradients(batch: Batch, rng: jax.Array) -> tuple[Any, Sums]:
        return jax.grad(loss_fn, has_aux=True)(params, batch, rng)

    if accumulate_steps == 1:
        return gradients(batch, rng)

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every micro-batch has rows of every device; contiguous ones would lie on few devices.
        return x.reshape(x.shape[0] // accumulate_steps, accumulate_steps, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        # The barrier keeps XLA for TPU from moving the sum over devices out of the loop, which it fails on.
        return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(gradients(*micro_batch))), None

    micro_batches = ({name: split(x) for name, x in batch.items()}, jax.random.split(rng, accumulate_steps))
    shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return total
