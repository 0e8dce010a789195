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


class Trainable(Protocol):
    """What the loop runs: a model with its objective and optimizer, as pure functions over `State`.

    Attributes:
      logical_axes: a tuple of logical axes (`lvm.mesh.RULES`) at each parameter.
    """

    logical_axes: Any

    @property
    def batch_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of the global batch."""

    def init(self, rng: jax.Array) -> State:
        """A fresh state, a pure function of `rng`."""

    def update(self, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """One optimizer step; `metrics` are float32 scalars, with `loss` among them."""

    def evaluate(self, state: State) -> dict[str, float]:
        """Held-out metrics, under the names that `metrics.jsonl` uses."""

    def pictures(self, state: State) -> dict[str, np.ndarray]:
        """Named pictures uint8 [H, W, 3] of what the model does now."""


def make_update(
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """The usual update: gradient, optimizer, new parameters, norms.

    Args:
      loss_fn: (params, batch, rng) → (loss, metrics).
      optimizer: its state is `state["training"]["optimizer"]`.
      schedule: step → learning rate, for the metrics alone.
    """

    def update(state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], batch, rng)
        changes, moments = optimizer.update(gradients, state["training"]["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], changes)
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        state = {"step": state["step"] + 1, "params": params, "training": {"optimizer": moments}}
        return state, metrics

    return update
