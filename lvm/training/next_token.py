"""Next-code prediction as a `TrainTask`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import abstract_module, init_params, logical_axes, merge
from lvm.model.transformer import ModelConfig, Transformer
from lvm.training.losses import token_losses
from lvm.training.task import Batch, State, Sums, init_skip_counts, make_update


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """How the next code is learned.

    Attributes:
      z_loss: weight of the squared log-normaliser, which keeps logits from drifting (PaLM, arXiv 2204.02311).
      logits_chunk: tokens of a row whose logits are in memory at once.
      accumulate_steps: parts of a batch that are computed one after the other before the optimizer's step.
    """

    z_loss: float = 0.0
    logits_chunk: int = 1024
    accumulate_steps: int = 1

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise UserError(f"z_loss: {self.z_loss} is negative")
        for name in ("logits_chunk", "accumulate_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")


@dataclasses.dataclass
class NextTokenTask:
    """A transformer that learns the next token of every row.

    Attributes:
      config: the model, its vocabulary size set.
      batch_spec: of the batches (`lvm.data.mixture.rows`).
      component_names: what `component_ids` count; metrics name each component's loss after it.
      optimizer, schedule: of `lvm.training.optimizer`.
      mesh: the devices that activations are split over; None for one device.
      objective: see `ObjectiveConfig`.
      heldout: batches that `evaluate` averages over.
      render_pictures: makes the pictures of a state; none by default.
      kernel: the attention that runs.
      graphdef, params_shape: the model, split, and its parameters' shapes.

    Raises:
      UserError: the kernel can't run on the mesh's devices, or the mesh doesn't divide the model.
    """

    config: ModelConfig
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    component_names: Sequence[str]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh | None = None
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    heldout: Sequence[Mapping[str, np.ndarray]] = ()
    render_pictures: Callable[[State], dict[str, np.ndarray]] = lambda state: {}

    def __post_init__(self) -> None:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        self.kernel = choose_kernel(
            self.config.attention,
            platform,
            self.config.dtype,
            self.config.head_dim,
            segmented="segment_ids" in self.batch_spec,
        )
        self._check_mesh()
        self._make = lambda rngs: Transformer(self.config, rngs)
        self.graphdef, self.params_shape = abstract_module(self._make)
        self.logical_axes = logical_axes(self._make)
        self.update = make_update(self._loss, self.optimizer, self.schedule, self.objective.accumulate_steps)
        self._sums = jax.jit(lambda params, batch: self._loss(params, batch, jax.random.key(0))[1]["loss"])

    def _check_mesh(self) -> None:
        if self.mesh is None:
            return
        batch_size, row = self.batch_spec["tokens"].shape
        sizes, parts = self.mesh.shape, self.objective.accumulate_steps
        ways = sizes["data"] * sizes["fsdp"] * parts
        if batch_size % ways:
            raise UserError(
                f"config.batch_size: {batch_size} is not divisible by data × fsdp × accumulate_steps = "
                f"{sizes['data']} × {sizes['fsdp']} × {parts}"
            )
        if (row - 1) % sizes["sequence"]:
            raise UserError(
                f"config.mesh.sequence: {sizes['sequence']} doesn't divide the context of {row - 1}"
            )

    def init(self, rng: jax.Array) -> State:
        """Fresh parameters and moments."""
        params = init_params(self._make, rng)
        training = {"optimizer": self.optimizer.init(params), "skipped": init_skip_counts()}
        return {"step": jnp.int32(0), "params": params, "training": training}

    def evaluate(self, state: State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """The mean loss over the held-out batches, in parts no larger than training's."""
        total = weight = 0.0
        parts = self.objective.accumulate_steps
        for batch in self.heldout:
            for part in range(parts):
                if stopping():
                    return {}
                rows = {name: x[part::parts] for name, x in batch.items()}
                part_total, part_weight = self._sums(state["params"], rows)
                total, weight = total + float(part_total), weight + float(part_weight)
        return {"heldout_loss": total / weight} if weight else {}

    def pictures(self, state: State) -> dict[str, np.ndarray]:
        """Whatever `render_pictures` makes."""
        return self.render_pictures(state)

    def _loss(self, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Sums]:
        with sharding.use_mesh(self.mesh):
            arrays = {name: sharding.constrain(x, "batch", None) for name, x in batch.items()}
            inputs, targets = arrays["tokens"][:, :-1], arrays["tokens"][:, 1:]  # [B, C]
            model: Transformer = merge(self.graphdef, params)
            hidden = model.hidden(
                inputs, arrays["positions"], self.kernel, arrays.get("segment_ids")
            )  # [B, C, D]
            losses, log_z = token_losses(
                model.norm(hidden), model.output_projection(), targets, self.objective.logits_chunk
            )  # [B, C]
        counted = batch["loss_mask"].astype(jnp.float32)  # [B, C]
        sums = {"loss": (jnp.sum(losses * counted), jnp.sum(counted))}
        for number, name in enumerate(self.component_names):
            mine = counted * (batch["component_ids"] == number)
            sums[f"loss/{name}"] = jnp.sum(losses * mine), jnp.sum(mine)
        return jnp.sum((losses + self.objective.z_loss * log_z**2) * counted), sums
