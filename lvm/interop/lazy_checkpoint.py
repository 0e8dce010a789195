"""A transformer at rest: what it is, and its tensors by name, read when they are asked for.

Every format is read into this and written from it, a layer at a time: the tensor `layers.3.mlp.gate` is
`params["layers"]["mlp"]["gate"][3]` of the model in memory. No format needs to know another.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from lvm.common.errors import UserError
from lvm.interop.tensors import BFLOAT16, LazyTensor, Tensors, cast, check_shapes, stack
from lvm.model.nnx_utils import Params, abstract_module
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import FILENAME, Vocabulary
from lvm.training.workdir import RECORD_VERSION

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
_PUBLISHED = Vocabulary(8192, 8292, bos=None, eos=None, pad=8192)  # of LVM's checkpoints
_UNDECLARED = {_PUBLISHED.size: _PUBLISHED, 8448: Vocabulary.for_codes(8192)}
_STACKED = "layers"
# What is known of a model that wasn't trained here.
NO_RECORD: dict[str, Any] = {
    "version": RECORD_VERSION, "kind": "lvm", "tokenizer": None, "stores": [], "sources": []
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LazyCheckpoint:
    """A transformer at rest.

    Attributes:
      config: its sizes, the vocabulary's among them.
      vocabulary: of `config.vocabulary_size` ids.
      tensors: every parameter, one a layer.
      record: what its training said of itself (`lvm.training.workdir`); `NO_RECORD` where nothing tells.
      step: of that training; 0 where nothing tells.
      path: the folder, for errors.
      stacked: parameters that the file holds stacked, by their dotted names: read at once where all of one is needed.
    """

    config: ModelConfig
    vocabulary: Vocabulary
    tensors: Tensors
    record: Mapping[str, Any]
    step: int
    path: str
    stacked: Tensors = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """That of most of its numbers."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.nbytes
        return max(sizes, key=lambda name: sizes[name])

    def load_params(self) -> Params:
        """The parameters in memory, in their stored types, stacked as `Transformer` has them."""
        return _on_device(self.tree())

    def tree(self) -> dict[str, Any]:
        """The tree of `Transformer`'s parameters, of tensors that are read when they are asked for."""
        tree: dict[str, Any] = {}
        for name in stacked_shapes(self.config):
            *path, leaf = name.split(".")
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)
            if name in self.stacked:
                node[leaf] = self.stacked[name]
            elif path[:1] == [_STACKED]:
                layers = [self.tensors[n] for n in layer_names(name, self.config)]
                node[leaf] = stack(layers, f"{self.path}: {name}")
            else:
                node[leaf] = self.tensors[name]
        return tree

    def load_layer(self, index: int) -> Params:
        """One layer's parameters in memory, float32."""
        tree: dict[str, Any] = {}
        prefix = f"{_STACKED}.{index}."
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                *path, leaf = name.removeprefix(prefix).split(".")
                node = functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)
                node[leaf] = jnp.asarray(tensor.read(), jnp.float32)
        return tree


def _on_device(tree: Any) -> Any:
    if isinstance(tree, LazyTensor):
        return jnp.asarray(tree.read())
    return {key: _on_device(value) for key, value in tree.items()}


@functools.lru_cache(maxsize=8)
def stacked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter as `Transformer` has them, by its dotted name."""
    flat: dict[str, tuple[int, ...]] = {}

    def walk(tree: Any, name: str) -> None:
        if not isinstance(tree, dict):
            flat[name] = tree.shape
            return
        for key, value in tree.items():
            walk(value, f"{name}.{key}" if name else key)

    walk(abstract_module(lambda rngs: Transformer(config, rngs))[1], "")
    return flat


def layer_names(name: str, config: ModelConfig) -> list[str]:
    """`layers.mlp.gate` → `layers.0.mlp.gate`, `layers.1.mlp.gate` …"""
    rest = name.removeprefix(f"{_STACKED}.")
    return [f"{_STACKED}.{number}.{rest}" for number in range(config.num_layers)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, one a layer, in the order in which they are used."""
    whole = stacked_shapes(config)
    stacked = {name: shape for name, shape in whole.items() if name.startswith(f"{_STACKED}.")}
    found = {"embedding": whole["embedding"]}
    for number in range(config.num_layers):
        found |= {layer_names(name, config)[number]: shape[1:] for name, shape in stacked.items()}
    return found | {name: whole[name] for name in ("norm.scale", "head") if name in whole}


def check_dtypes(tensors: Tensors, where: str) -> None:
    """That all tensors are of floating-point types that we know.

    Raises:
      UserError: lists those that are not.
    """
    wrong = [f"{name} {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES.values()]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong[:8])}; expected {', '.join(DTYPES)}")


def load_vocabulary(folder: epath.Path, size: int) -> Vocabulary:
    """The vocabulary of a folder's model: the declared one, or what two sizes mean undeclared.

    Raises:
      UserError: the declaration is of another size, or there is none and the size tells nothing.
    """
    if (folder / FILENAME).exists():
        found = Vocabulary.load(folder)
        if found.size != size:
            raise UserError(f"{folder / FILENAME}: size: {found.size}, the model's vocabulary has {size}")
        return found
    if size not in _UNDECLARED:
        raise UserError(
            f"{folder}: a vocabulary of {size} ids and no {FILENAME} beside the weights; undeclared, "
            f"{' and '.join(map(str, _UNDECLARED))} alone are known to be codes (a language model's vocabulary has "
            "none); declare num_codes, size, bos, eos and pad"
        )
    return _UNDECLARED[size]


def with_dtype(checkpoint: LazyCheckpoint, dtype: str) -> LazyCheckpoint:
    """The same in another floating-point type."""
    tensors = {
        name: cast(tensor, DTYPES[dtype], f"{checkpoint.path}: {name}")
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors, stacked={})


def resize_vocabulary(checkpoint: LazyCheckpoint, size: int) -> LazyCheckpoint:
    """The same with a vocabulary of `size` ids.

    Ids keep their rows, bit for bit, and specials their ids; each new id gets the mean of all rows, in the embedding
    and in the output projection. So what a model says of codes doesn't change, but for the probability that the
    new ids take.

    Raises:
      UserError: a code or a special would be cut off.
    """
    old = checkpoint.vocabulary
    if size == old.size:
        return checkpoint
    specials = {name: getattr(old, name) for name in ("bos", "eos", "pad")}
    needed = max([old.num_codes, *(token + 1 for token in specials.values() if token is not None)])
    if size < needed:
        kept = ", ".join(f"{name} {token}" for name, token in specials.items() if token is not None)
        raise UserError(
            f"{checkpoint.path}: a vocabulary of {size} ids would cut off some of its {old.num_codes} codes and "
            f"{kept or 'no specials'}; it needs {needed}"
        )
    tensors = dict(checkpoint.tensors)
    for name, axis in (("embedding", 0), ("head", 1)):
        if name in tensors:
            tensors[name] = _resized(tensors[name], axis, size)
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, vocabulary_size=size),
        vocabulary=dataclasses.replace(old, size=size),
        tensors=tensors,
        stacked={name: tensor for name, tensor in checkpoint.stacked.items() if name not in tensors},
    )


def _resized(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
    shape = tuple(size if i == axis else n for i, n in enumerate(tensor.shape))

    def read() -> np.ndarray:
        old = tensor.read()
        kept = min(size, old.shape[axis])
        new = np.empty(shape, tensor.dtype)
        new_rows, old_rows = np.moveaxis(new, axis, 0), np.moveaxis(old, axis, 0)
        new_rows[:kept] = old_rows[:kept]
        if size > kept:
            new_rows[kept:] = old_rows.mean(0, dtype=np.float32).astype(tensor.dtype)
        return new

    return LazyTensor(shape, tensor.dtype, read)


def check_tensors(tensors: Tensors, config: ModelConfig, where: str | os.PathLike[str]) -> None:
    """That tensors are those of a model, in floating-point types.

    Raises:
      UserError: lists what is missing, unexpected, of another shape or of another type.
    """
    check_shapes(tensors, tensor_shapes(config), os.fspath(where))
    check_dtypes(tensors, os.fspath(where))
