"""Analytic memory model of a training step: for chips that nothing compiles for here, and to prune a search."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lvm.model.transformer import ModelConfig
from lvm.planning.collectives import layer_weight_shapes
from lvm.training.config import TrainConfig

# Elements saved for the backward pass per token and layer: (multiple of hidden_size, multiple of mlp_size). "none" adds
# to "dots" what lies between the matrix products: norms, rotated queries and keys, the two halves of SwiGLU.
_SAVED = {"none": (11, 4), "dots": (5, 2), "attention": (1, 0), "full": (0, 0)}


def count_parameters(model: ModelConfig) -> int:
    """Parameters of a model with its vocabulary size set."""
    D = model.hidden_size
    layers = model.num_layers * (sum(math.prod(shape) for shape in layer_weight_shapes(model)) + 2 * D)
    return layers + D + (1 if model.tie_embeddings else 2) * model.vocabulary_size * D


def temp_bytes(config: TrainConfig) -> Float[np.ndarray, "2"]:
    """Bytes of temporaries per chip that scale with the weights, and with the activations.

    - weights: gradients in float32 and the optimizer's updates before they are known to be finite, 10 bytes for each
      parameter of the chip's shard; one layer's gathered weights and their gradients before the scatter; embedding and
      output projection, gathered, and their gradients in float32.
    - activations: the input of each layer, what rematerialization saves, one layer's own during its backward pass,
      three arrays of a chunk's logits in float32.

    `config` has vocabulary size, mesh and rematerialization policy resolved.
    """
    model, mesh, objective = config.model, config.mesh, config.objective
    width = jnp.dtype(model.dtype).itemsize
    D, F, V = model.hidden_size, model.mlp_size / mesh.tensor, model.vocabulary_size / mesh.tensor
    rows = config.batch_size / (mesh.data * mesh.fsdp * objective.accumulate_steps)  # per chip and micro-batch
    tokens = rows * model.context / mesh.sequence
    shard = 10.0 * count_parameters(model) / (mesh.fsdp * mesh.tensor)
    layer = 2.0 * width * sum(math.prod(shape) for shape in layer_weight_shapes(model)) / mesh.tensor
    embeddings = (2 * width + 2 * 4) * V * D
    saved_hidden, saved_mlp = _SAVED[model.remat]
    statistics = 4.0 * tokens * model.num_heads if saved_hidden else 0.0
    inputs = width * tokens * D * model.num_layers
    saved = model.num_layers * (width * tokens * (saved_hidden * D + saved_mlp * F) + statistics)
    backward = width * tokens * (8 * D + 4 * F)
    logits = 3 * 4.0 * min(objective.logits_chunk, model.context / mesh.sequence) * V * rows
    return np.array([shard + layer + embeddings, inputs + saved + backward + logits])


class MemoryModel:
    """`temp_bytes`, calibrated by compiled programs.

    Unscaled without any; with one, both terms have a common scale; with more, each has its own.
    """

    def __init__(self) -> None:
        self._terms: list[np.ndarray] = []
        self._measured: list[float] = []

    def observe(self, config: TrainConfig, measured_bytes: float) -> None:
        """Adds the temporaries of a compiled program, in bytes per chip."""
        self._terms.append(temp_bytes(config))
        self._measured.append(measured_bytes)

    def temp_bytes(self, config: TrainConfig) -> float:
        """Bytes of temporaries per chip."""
        return float(temp_bytes(config) @ self._scales())

    def _scales(self) -> Float[np.ndarray, "2"]:
        if not self._terms:
            return np.ones(2)
        terms, measured = np.array(self._terms), np.array(self._measured)
        common = float((measured / terms.sum(1)).mean())
        if len(terms) == 1:
            return np.full(2, common)
        # Least squares of relative errors, with a weak pull to the common scale for what the programs do not determine.
        pull = 0.05 * np.eye(2)
        matrix = np.concatenate([terms / measured[:, None], pull])
        targets = np.concatenate([np.ones(len(measured)), pull @ np.full(2, common)])
        return np.clip(np.linalg.lstsq(matrix, targets)[0], 0.25, 4.0)
