"""Tensor names and layouts of transformers' Llama and of EasyLM.

As a matrix [in, out], a tensor of ours is an EasyLM kernel and the transpose of a torch weight. RoPE rotates the two
halves of a head in transformers as in our model; EasyLM rotates neighbors, so its heads are [d/2, 2] where ours are
[2, d/2].
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from lvm.interop.lazy_checkpoint import tensor_shapes
from lvm.interop.tensors import LazyTensor, Tensors
from lvm.model.transformer import ModelConfig

_ROTATED = ("attention.query", "attention.key")
_UNCHANGED = ("embedding", "scale")  # [V, D] and [D] in every layout


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and axes of a transformer's tensors in another format.

    Attributes:
      names: our name → theirs, with `{}` for the index of the layer.
      transposed: matrices are [out, in].
      interleaved: RoPE rotates neighboring elements of a head.
    """

    names: Mapping[str, str]
    transposed: bool
    interleaved: bool

    def name(self, ours: str) -> str:
        """Their name of one of our tensors, such as `layers.3.mlp.gate`."""
        index = re.search(r"\d+", ours)
        if index is None:
            return self.names[ours]
        return self.names[ours.replace(f".{index[0]}.", ".{}.", 1)].format(index[0])

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by their names."""
        return {self.name(name): self._shape(name, shape) for name, shape in tensor_shapes(config).items()}

    def import_tensors(self, external: Tensors, config: ModelConfig) -> dict[str, LazyTensor]:
        """Their tensors under our names, converted when they are read."""

        def convert(name: str, shape: tuple[int, ...]) -> LazyTensor:
            tensor = external[self.name(name)]
            return LazyTensor(shape, tensor.dtype, lambda: self._to_ours(name, tensor.read(), shape))

        return {name: convert(name, shape) for name, shape in tensor_shapes(config).items()}

    def export_tensors(self, tensors: Tensors) -> dict[str, LazyTensor]:
        """The inverse of `import_tensors`."""

        def convert(name: str, tensor: LazyTensor) -> LazyTensor:
            shape = self._shape(name, tensor.shape)
            return LazyTensor(shape, tensor.dtype, lambda: self._to_theirs(name, tensor.read()))

        return {self.name(name): convert(name, tensor) for name, tensor in tensors.items()}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.endswith(_UNCHANGED):
            return shape
        inputs, outputs = _matrix_shape(name, shape)
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def _to_theirs(self, name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith(_UNCHANGED):
            return array
        shape = _matrix_shape(name, array.shape)
        if self.interleaved and name.endswith(_ROTATED):
            D, H, d = array.shape
            array = array.reshape(D, H, 2, d // 2).swapaxes(2, 3)  # [D, H, d/2, 2]
        matrix = array.reshape(shape)
        return np.ascontiguousarray(matrix.T if self.transposed else matrix)

    def _to_ours(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(_UNCHANGED):
            return array
        matrix = array.T if self.transposed else array
        if self.interleaved and name.endswith(_ROTATED):
            D, H, d = shape
            matrix = matrix.reshape(D, H, d // 2, 2).swapaxes(2, 3)  # [D, H, 2, d/2]
        return np.ascontiguousarray(matrix.reshape(shape))


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output sizes: heads are outputs of query, key and value, and inputs of the output projection."""
    num_inputs = 2 if name.endswith("attention.out") else 1
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


HUGGING_FACE = Layout(
    {
        "embedding": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "head": "lm_head.weight",
        "layers.{}.attention.query": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.key": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.value": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.out": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj.weight",
        "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj.weight",
        "layers.{}.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
        "layers.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    },
    transposed=True,
    interleaved=False,
)

EASYLM = Layout(
    {
        "embedding": "transformer.wte.embedding",
        "norm.scale": "transformer.ln_f.kernel",
        "head": "lm_head.kernel",
        "layers.{}.attention.query": "transformer.h.{}.attention.wq.kernel",
        "layers.{}.attention.key": "transformer.h.{}.attention.wk.kernel",
        "layers.{}.attention.value": "transformer.h.{}.attention.wv.kernel",
        "layers.{}.attention.out": "transformer.h.{}.attention.wo.kernel",
        "layers.{}.mlp.gate": "transformer.h.{}.feed_forward.w1.kernel",
        "layers.{}.mlp.up": "transformer.h.{}.feed_forward.w3.kernel",
        "layers.{}.mlp.down": "transformer.h.{}.feed_forward.w2.kernel",
        "layers.{}.attention_norm.scale": "transformer.h.{}.attention_norm.kernel",
        "layers.{}.mlp_norm.scale": "transformer.h.{}.ffn_norm.kernel",
    },
    transposed=False,
    interleaved=True,
)
