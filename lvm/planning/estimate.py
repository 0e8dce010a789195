"""What a step needs of a chip's memory, by a formula: for chips that no compiler is here for, and to search with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lvm.hardware.sharding import MeshConfig
from lvm.model.transformer import ModelConfig
from lvm.planning.collectives import layer_matrices

# In numbers of the compute dtype a token and layer, what the backward pass finds saved: (widths D, widths F). "none"
# adds to "dots" what lies between the products: norms, rotated queries and keys, the two halves of SwiGLU.
_SAVED = {"none": (11, 4), "dots": (5, 2), "attention": (1, 0), "full": (0, 0)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides a chip's memory.

    Attributes:
      model: its vocabulary size and policy of rematerialisation set.
      mesh: no axis is -1.
      rows: of a batch.
      parts: `accumulate_steps`.
      chunk: tokens of a row whose logits are in memory at once.
    """

    model: ModelConfig
    mesh: MeshConfig
    rows: int
    parts: int
    chunk: int

    @property
    def ways(self) -> int:
        """Chips that share what is split like a parameter."""
        return self.mesh.fsdp * self.mesh.tensor

    @property
    def rows_at_once(self) -> float:
        """Rows that one chip works on at a time."""
        return self.rows / (self.mesh.data * self.mesh.fsdp * self.parts)


def count_parameters(model: ModelConfig) -> int:
    """Numbers of a model with its vocabulary size set."""
    D = model.hidden_size
    layers = model.num_layers * (sum(math.prod(shape) for shape in layer_matrices(model)) + 2 * D)
    return layers + D + (1 if model.tie_embeddings else 2) * model.vocabulary_size * D


def temporaries(shape: Shape) -> dict[str, float]:
    """Bytes a chip by what they are for; those of weights and those of activations are `weights` and `activations`.

    - weights: gradients in float32 and what the optimizer makes of them before it is known that they are finite, 10
      bytes a parameter that the chip keeps; one layer's matrices gathered, and their gradients before they are
      scattered; embedding and head, gathered, and their gradients in float32.
    - activations: what enters each layer, what rematerialisation keeps of each, one layer's own while it is
      differentiated, three arrays of a chunk's logits in float32.
    """
    model, mesh = shape.model, shape.mesh
    width = 2 if model.dtype == "bfloat16" else 4
    D, F, V = model.hidden_size, model.mlp_size / mesh.tensor, model.vocabulary_size / mesh.tensor
    tokens = shape.rows_at_once * model.context / mesh.sequence
    kept = 10.0 * count_parameters(model) / shape.ways
    layer = 2.0 * width * sum(math.prod(matrix) for matrix in layer_matrices(model)) / mesh.tensor
    ends = (2 * width + 2 * 4) * V * D
    of_d, of_f = _SAVED[model.remat]
    statistics = 4.0 * tokens * model.num_heads if of_d else 0.0
    entering = width * tokens * D * model.num_layers
    saved = model.num_layers * (width * tokens * (of_d * D + of_f * F) + statistics)
    own = width * tokens * (8 * D + 4 * F)
    logits = 3 * 4.0 * min(shape.chunk, model.context / mesh.sequence) * V * shape.rows_at_once
    return {"weights": kept + layer + ends, "activations": entering + saved + own + logits}


class Memory:
    """The formula, fitted to what compiled programs needed.

    Without any it is as it stands; with one, both its terms are scaled alike; with more, each by its own factor.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Shape, float]] = []

    def learn(self, shape: Shape, found: float) -> None:
        """That a program's temporaries are `found` bytes a chip."""
        self._seen.append((shape, found))

    def temporaries(self, shape: Shape) -> float:
        """Bytes a chip."""
        return float(np.dot(_terms(shape), self._factors()))

    def _factors(self) -> np.ndarray:
        if not self._seen:
            return np.ones(2)
        terms = np.array([_terms(shape) for shape, _ in self._seen])
        found = np.array([size for _, size in self._seen])
        common = float((found / terms.sum(1)).mean())
        if len(self._seen) == 1:
            return np.full(2, common)
        # Relative errors count; what the programs don't tell apart stays near the common factor.
        pull = 0.05 * np.eye(2)
        left = np.concatenate([terms / found[:, None], pull])
        right = np.concatenate([np.ones(len(found)), pull @ np.full(2, common)])
        return np.clip(np.linalg.lstsq(left, right)[0], 0.25, 4.0)


def _terms(shape: Shape) -> Sequence[float]:
    found = temporaries(shape)
    return [found["weights"], found["activations"]]
