"""Next-token prediction as a `TrainTask`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.mixture import loader
from lvm.hardware import sharding
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import Params, abstract_module, init_params, logical_axes, merge
from lvm.model.transformer import ModelConfig, Transformer
from lvm.training.losses import token_losses
from lvm.training.task import Batch, State, Sums, init_skip_counts, make_update


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective.

    Attributes:
      z_loss: weight of the squared log-normalizer, which keeps logits from drifting (PaLM, arXiv 2204.02311).
      logits_chunk: tokens of a row whose logits are in memory at once.
      accumulate_steps: micro-batches per optimizer step (gradient accumulation).
      rows_per_device: the most rows of a micro-batch on each of the mesh's data × fsdp devices, from which
        `accumulate_steps` follows: on fewer devices a run makes more micro-batches, and its batches stay the same. 0
        takes `accumulate_steps`.
    """

    z_loss: float = 0.0
    logits_chunk: int = 1024
    accumulate_steps: int = 1
    rows_per_device: int = 0

    def __post_init__(self) -> None:
        check_non_negative(self, "z_loss", "rows_per_device")
        check_positive(self, "logits_chunk", "accumulate_steps")
        if self.rows_per_device and self.accumulate_steps > 1:
            raise UserError(
                f"config.objective: rows_per_device={self.rows_per_device} and accumulate_steps="
                f"{self.accumulate_steps}; set one of them"
            )

    def for_mesh(self, batch_size: int, data: int, fsdp: int) -> ObjectiveConfig:
        """Replaces `rows_per_device` by the `accumulate_steps` that it means for a batch on a mesh."""
        if not self.rows_per_device:
            return self
        rows = batch_size // (data * fsdp)  # a rest is an error of the mesh
        counts = (count for count in range(1, rows + 1) if rows % count == 0)
        steps = next((count for count in counts if rows // count <= self.rows_per_device), 1)
        return dataclasses.replace(self, accumulate_steps=steps, rows_per_device=0)


@dataclasses.dataclass
class NextTokenTask:
    """A transformer that predicts the next token of every row.

    Attributes:
      config: the model, its vocabulary size set.
      batch_spec: of the batches (`lvm.data.mixture.rows`).
      component_names: component of each id in `component_ids`; each has its own metric `loss/NAME`.
      optimizer, schedule: of `lvm.training.optimizer`.
      mesh: the devices that activations are sharded over; None for one device.
      objective: the training objective.
      heldout: batches that `evaluate` averages over; of each, the rows on this process's devices (`Step.rows`).
      pictures: renders the pictures of a state; none by default.
      num_codes: ids below it are codes, which alone count in `loss/NAME`; None counts all targets. BOS and EOS are
        certain: a batch with no more of a component than its EOS would show a loss of almost 0.
      kernel: the attention kernel in use.
      graphdef, params_shape: the model's graph definition and its parameters' shapes.

    Raises:
      UserError: the kernel can't run on the mesh's devices, or the mesh doesn't divide the batch.
    """

    config: ModelConfig
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    component_names: Sequence[str]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh | None = None
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    heldout: Sequence[Mapping[str, np.ndarray]] = ()
    pictures: Callable[[State], dict[str, UInt8[np.ndarray, "H W 3"]]] = lambda state: {}
    num_codes: int | None = None

    def __post_init__(self) -> None:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        config, segmented = self.config, "segment_ids" in self.batch_spec
        self.kernel = choose_kernel(config.attention, platform, config.dtype, config.head_dim, segmented=segmented)
        if self.mesh is not None:
            self._check_mesh(self.mesh.shape)
        self._make_model = lambda rngs: Transformer(self.config, rngs)
        self.graphdef, self.params_shape = abstract_module(self._make_model)
        self.logical_axes = logical_axes(self._make_model)
        self.update = make_update(self._loss, self.optimizer, self.schedule, self.objective.accumulate_steps)
        self._loss_sum = jax.jit(lambda params, batch: self._loss(params, batch, jax.random.key(0))[1]["loss"])

    def _check_mesh(self, sizes: Mapping[str, int]) -> None:
        (batch_size, length), accumulate_steps = self.batch_spec["tokens"].shape, self.objective.accumulate_steps
        if batch_size % (sizes["data"] * sizes["fsdp"] * accumulate_steps):
            raise UserError(
                f"config.batch_size: {batch_size} is not divisible by data × fsdp × accumulate_steps = "
                f"{sizes['data']} × {sizes['fsdp']} × {accumulate_steps}"
            )
        if (length - 1) % sizes["sequence"]:
            raise UserError(f"config.mesh.sequence: {sizes['sequence']} doesn't divide the context of {length - 1}")

    def init(self, rng: Key[Array, ""]) -> State:
        """Returns fresh parameters and optimizer state."""
        params = init_params(self._make_model, rng)
        training = {"optimizer": self.optimizer.init(params), "skipped": init_skip_counts()}
        return {"step": jnp.int32(0), "params": params, "training": training}

    def evaluate(self, state: State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Returns the mean loss over the held-out batches, computed in micro-batches; {} once `stopping()`."""
        total = weight = 0.0
        num_micro_batches = self.objective.accumulate_steps
        for batch in self.heldout:
            for index in range(num_micro_batches):
                if stopping():
                    return {}
                loss_sum, num_targets = self._loss_sum(state["params"], self._heldout_micro_batch(batch, index))
                total, weight = total + float(loss_sum), weight + float(num_targets)
        return {"heldout_loss": total / weight} if weight else {}

    def _heldout_micro_batch(self, batch: Mapping[str, np.ndarray], index: int) -> Batch:
        """Rows `index`, `index` + n … of a batch, for n micro-batches: of each device's rows as many."""
        num_micro_batches = self.objective.accumulate_steps
        local = {name: x[index::num_micro_batches] for name, x in batch.items()}
        if self.mesh is None:
            return local
        size = next(iter(self.batch_spec.values())).shape[0] // num_micro_batches
        batch_sharding = sharding.batch_sharding(self.mesh, size)
        rows = loader.local_rows(batch_sharding, (size,))
        return {name: loader.to_global(x, rows, batch_sharding, (size, *x.shape[1:])) for name, x in local.items()}

    def _loss(self, params: Params, batch: Batch, rng: Key[Array, ""]) -> tuple[Float[Array, ""], Sums]:
        with sharding.use_mesh(self.mesh):
            arrays = {name: sharding.constrain(x, "batch", None) for name, x in batch.items()}
            inputs, targets = arrays["tokens"][:, :-1], arrays["tokens"][:, 1:]  # [B, C]
            model: Transformer = merge(self.graphdef, params)
            hidden = model.hidden(inputs, arrays["positions"], self.kernel, arrays.get("segment_ids"))
            losses, log_z = token_losses(
                model.norm(hidden), model.output_projection(), targets, self.objective.logits_chunk
            )  # [B, C]
        weights = batch["loss_mask"].astype(jnp.float32)  # [B, C]
        sums = {"loss": (jnp.sum(losses * weights), jnp.sum(weights))}
        counted = weights if self.num_codes is None else weights * (targets < self.num_codes)
        for index, name in enumerate(self.component_names):
            component_weights = counted * (batch["component_ids"] == index)
            sums[f"loss/{name}"] = jnp.sum(losses * component_weights), jnp.sum(component_weights)
        return jnp.sum((losses + self.objective.z_loss * log_z**2) * weights), sums
