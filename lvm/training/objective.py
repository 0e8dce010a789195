"""Next-code prediction as a `Trainable`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lvm.attention import choose_kernel
from lvm.model import ModelConfig, Transformer
from lvm.module import abstract, init_params, logical_axes, merge
from lvm.training.trainable import Batch, Metrics, State, make_update


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target: logits float32 [B, T, V], targets int32 [B, T] → [B, T]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, T]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@dataclasses.dataclass
class NextCode:
    """A transformer that learns the next token of every row.

    Attributes:
      config: the model, its vocabulary size set.
      batch_spec: of the batches (`lvm.data.rows`).
      source_names: what `source_ids` count; metrics name each source's loss after it.
      optimizer, schedule: of `lvm.training.optimizer`.
      heldout: batches that `evaluate` averages over.
      draw: makes the pictures of a state; none by default.
      kernel: the attention that runs.
      graphdef, params_shape: the model, split, and its parameters' shapes.
    """

    config: ModelConfig
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    source_names: Sequence[str]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    heldout: Sequence[Mapping[str, np.ndarray]] = ()
    draw: Callable[[State], dict[str, np.ndarray]] = lambda state: {}

    def __post_init__(self) -> None:
        self.kernel = choose_kernel(self.config.attention, jax.default_backend(), self.config.dtype)
        self._make = lambda rngs: Transformer(self.config, rngs)
        self.graphdef, self.params_shape = abstract(self._make)
        self.logical_axes = logical_axes(self._make)
        self.update = make_update(self._loss, self.optimizer, self.schedule)
        self._jitted_loss = jax.jit(self._loss)

    def init(self, rng: jax.Array) -> State:
        """Fresh parameters and moments."""
        params = init_params(self._make, rng)
        training = {"optimizer": self.optimizer.init(params)}
        return {"step": jnp.int32(0), "params": params, "training": training}

    def evaluate(self, state: State) -> dict[str, float]:
        """The mean loss over the held-out batches."""
        if not self.heldout:
            return {}
        key = jax.random.key(0)
        losses = [self._jitted_loss(state["params"], batch, key)[0] for batch in self.heldout]
        return {"heldout_loss": float(np.mean([float(loss) for loss in losses]))}

    def pictures(self, state: State) -> dict[str, np.ndarray]:
        """Whatever `draw` makes."""
        return self.draw(state)

    def _loss(self, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]  # [B, C]
        logits = merge(self.graphdef, params)(inputs, batch["positions"], self.kernel)  # [B, C, V]
        losses = token_losses(logits, targets)  # [B, C]
        counted = batch["loss_mask"].astype(jnp.float32)  # [B, C]
        metrics = {}
        for number, name in enumerate(self.source_names):
            mine = counted * (batch["source_ids"] == number)
            metrics[f"loss/{name}"] = jnp.sum(losses * mine) / jnp.sum(mine)
        return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1.0), metrics
