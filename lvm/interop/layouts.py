"""What transformers' Llama and EasyLM call our tensors, and how they lay them out.

As a matrix [in, out], a tensor of ours is EasyLM's kernel and the transpose of a torch weight. transformers turns the
same halves of a head as we do; EasyLM turns neighbours, so its heads are [d/2, 2] where ours are [2, d/2].
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from lvm.interop.lazy_checkpoint import tensor_shapes
from lvm.interop.tensors import LazyTensor, Tensors
from lvm.model.transformer import ModelConfig

_TURNED = ("attention.query", "attention.key")
_TABLES = ("embedding", "scale")  # the same everywhere: [V, D] and [D]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of writing a transformer.

    Attributes:
      names: our name → theirs, `{}` for the number of the layer.
      transposed: matrices are [out, in].
      interleaved: neighbouring numbers of a head are turned together.
    """

    names: Mapping[str, str]
    transposed: bool
    interleaved: bool

    def name(self, ours: str) -> str:
        """`layers.3.mlp.gate` → their name of it."""
        number = re.search(r"\d+", ours)
        kind = ours if number is None else ours.replace(f".{number[0]}.", ".{}.", 1)
        return self.names[kind].format(number and number[0])

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Their name of every tensor → its shape in their file."""
        return {self.name(name): self._shape(name, shape) for name, shape in tensor_shapes(config).items()}

    def import_tensors(self, theirs: Tensors, config: ModelConfig) -> dict[str, LazyTensor]:
        """Their tensors under our names, in our layout, as they are read."""
        return {
            name: self._map(theirs[self.name(name)], name, shape, back=True)
            for name, shape in tensor_shapes(config).items()
        }

    def export_tensors(self, ours: Tensors) -> dict[str, LazyTensor]:
        """The inverse of `import_tensors`."""
        return {
            self.name(name): self._map(t, name, self._shape(name, t.shape), back=False)
            for name, t in ours.items()
        }

    def _map(self, tensor: LazyTensor, name: str, shape: tuple[int, ...], back: bool) -> LazyTensor:
        def read() -> np.ndarray:
            array = tensor.read()
            return self._to_ours(name, array, shape) if back else self._to_theirs(name, array)

        return LazyTensor(shape, tensor.dtype, read)

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.endswith(_TABLES):
            return shape
        inputs, outputs = _matrix(name, shape)
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def _to_theirs(self, name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith(_TABLES):
            return array
        if self.interleaved and name.endswith(_TURNED):
            D, H, d = array.shape
            array = array.reshape(D, H, 2, d // 2).swapaxes(2, 3)  # [D, H, d/2, 2]
            matrix = array.reshape(D, H * d)
        else:
            matrix = array.reshape(_matrix(name, array.shape))
        return np.ascontiguousarray(matrix.T if self.transposed else matrix)

    def _to_ours(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(_TABLES):
            return array
        matrix = array.T if self.transposed else array
        if self.interleaved and name.endswith(_TURNED):
            D, H, d = shape
            matrix = matrix.reshape(D, H, d // 2, 2).swapaxes(2, 3)  # [D, H, 2, d/2]
        return np.ascontiguousarray(matrix.reshape(shape))


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's inputs and outputs: heads are outputs of query, key and value, inputs of the way back."""
    inputs = 2 if name.endswith("attention.out") else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _names(layer: str, tensor: str, top: tuple[str, ...], inner: tuple[str, ...]) -> dict[str, str]:
    kinds = [f"attention.{part}" for part in ("query", "key", "value", "out")]
    kinds += [f"mlp.{part}" for part in ("gate", "up", "down")]
    kinds += ["attention_norm.scale", "mlp_norm.scale"]
    found = dict(zip(("embedding", "norm.scale", "head"), top, strict=True))
    pairs = zip(kinds, inner, strict=True)
    return found | {f"layers.{{}}.{kind}": f"{layer}.{name}.{tensor}" for kind, name in pairs}


HUGGING_FACE = Layout(
    _names(
        "model.layers.{}",
        "weight",
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
        ),
    ),
    transposed=True,
    interleaved=False,
)  # fmt: skip

EASYLM = Layout(
    _names(
        "transformer.h.{}",
        "kernel",
        ("transformer.wte.embedding", "transformer.ln_f.kernel", "lm_head.kernel"),
        (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w3", "feed_forward.w2", "attention_norm", "ffn_norm",
        ),
    ),
    transposed=False,
    interleaved=True,
)  # fmt: skip
