"""A transformer checkpoint: its configuration, and its tensors by name, read on demand.

The common representation of all formats: each is read into it and written from it one layer at a time. The tensor
`layers.3.mlp.gate` is `params["layers"]["mlp"]["gate"][3]` of the model in memory.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lvm import __version__
from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.interop.tensors import BFLOAT16, LazyTensor, Tensors, cast, format_names, stack
from lvm.model.nnx_utils import Params, abstract_module
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import FILENAME, Vocabulary
from lvm.training.workdir import RECORD_VERSION

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
_PUBLISHED = Vocabulary(8192, 8292, bos=None, eos=None, pad=8192)  # of LVM's released checkpoints
_KNOWN_VOCABULARIES = {_PUBLISHED.size: _PUBLISHED, 8448: Vocabulary.for_codes(8192)}
GENERATION_CONFIG = "generation_config.json"  # of transformers
_LAYERS = "layers."
# The run record of a model that was trained elsewhere.
NO_RECORD: dict[str, Any] = {"version": RECORD_VERSION, "kind": "lvm", "tokenizer": None, "stores": [], "sources": []}


@dataclasses.dataclass(frozen=True)
class LazyCheckpoint:
    """A transformer checkpoint whose tensors are read on demand.

    Attributes:
      config: the model.
      vocabulary: of `config.vocabulary_size` ids.
      tensors: every parameter, one tensor a layer (`tensor_shapes`).
      record: the run record (`lvm.training.workdir`) of its training; `NO_RECORD` if unknown.
      step: the training step; 0 if unknown.
      path: its folder or file, for messages.
      stacked: parameters that the file stores with layers stacked, by dotted name: read at once by `load_params`.
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
        """The dtype that most bytes are stored in."""
        sizes = collections.Counter[str]()
        for tensor in self.tensors.values():
            sizes[str(tensor.dtype)] += tensor.nbytes
        return sizes.most_common(1)[0][0]

    def export_record(self) -> dict[str, Any]:
        """The run record to write beside exported weights: with this version, without the folder, which is private."""
        config = {**self.record.get("config", {}), "model": to_json(self.config)}
        record = {name: value for name, value in self.record.items() if name != "folder"}
        return {**record, "config": config, "lvm_version": __version__}

    def load_params(self) -> Params:
        """Reads all parameters, in their stored dtypes, stacked as in `Transformer`."""
        return jax.tree.map(lambda tensor: jnp.asarray(tensor.read()), self.tree())

    def tree(self) -> dict[str, Any]:
        """The parameter tree of `Transformer`, with lazy tensors as leaves."""
        flat = {}
        for name in stacked_shapes(self.config):
            if name in self.stacked:
                flat[name] = self.stacked[name]
            elif name.startswith(_LAYERS):
                layers = [self.tensors[layer] for layer in layer_names(name, self.config)]
                flat[name] = stack(layers, f"{self.path}: {name}")
            else:
                flat[name] = self.tensors[name]
        return unflatten_dict(flat, sep=".")

    def load_layer(self, index: int) -> Params:
        """Reads the parameters of one layer in float32."""
        prefix = f"{_LAYERS}{index}."
        flat = {
            name.removeprefix(prefix): jnp.asarray(tensor.read(), jnp.float32)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        return unflatten_dict(flat, sep=".")


@functools.lru_cache(maxsize=8)
def stacked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `Transformer`, layers stacked, by dotted name."""
    params = abstract_module(lambda rngs: Transformer(config, rngs))[1]
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep=".").items()}


def layer_names(name: str, config: ModelConfig) -> list[str]:
    """`layers.mlp.gate` → `layers.0.mlp.gate`, `layers.1.mlp.gate` …"""
    return [f"{_LAYERS}{index}.{name.removeprefix(_LAYERS)}" for index in range(config.num_layers)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, one a layer, in the order of the forward pass."""
    params = stacked_shapes(config)
    shapes = {"embedding": params["embedding"]}
    for index in range(config.num_layers):
        shapes |= {
            f"{_LAYERS}{index}.{name.removeprefix(_LAYERS)}": shape[1:]
            for name, shape in params.items()
            if name.startswith(_LAYERS)
        }
    return shapes | {name: params[name] for name in ("norm.scale", "head") if name in params}


def check_dtypes(tensors: Tensors, path: str | os.PathLike[str]) -> None:
    """Raises UserError, with names, unless the dtype of every tensor is one of `DTYPES`."""
    wrong = [f"{name} {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES.values()]
    if wrong:
        raise UserError(f"{path}: unsupported dtypes: {format_names(wrong)}; expected {', '.join(DTYPES)}")


def load_vocabulary(folder: epath.Path, size: int) -> Vocabulary:
    """The vocabulary declared in a model folder, or a known one. Raises UserError unless one has this size.

    An export that another library saved again declares it in its generation_config.json alone.
    """
    if (folder / FILENAME).exists():
        vocabulary = Vocabulary.load(folder)
        if vocabulary.size != size:
            raise UserError(f"{folder / FILENAME}: size: {vocabulary.size}, the model's vocabulary has {size}")
        return vocabulary
    path = folder / GENERATION_CONFIG
    match files.read_json(path) if path.exists() else {}:
        # An export suppresses all ids that are not codes.
        case {"suppress_tokens": [int(first), *_] as suppressed, **fields} if suppressed == list(range(first, size)):
            specials = {name: fields.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
            return from_config_dict(Vocabulary, {"num_codes": first, "size": size, **specials}, os.fspath(path))
    if size not in _KNOWN_VOCABULARIES:
        raise UserError(
            f"{folder}: vocabulary of {size} ids without a {FILENAME}; only sizes "
            f"{' and '.join(map(str, _KNOWN_VOCABULARIES))} are known to be image codes. Declare num_codes, size, bos, "
            "eos and pad there (a language model has no image codes)"
        )
    return _KNOWN_VOCABULARIES[size]


def special_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """The ids of `bos`, `eos` and `pad`."""
    return {name: getattr(vocabulary, name) for name in ("bos", "eos", "pad")}


def with_dtype(checkpoint: LazyCheckpoint, dtype: str) -> LazyCheckpoint:
    """The checkpoint with tensors cast to a dtype of `DTYPES`."""
    tensors = {
        name: cast(tensor, DTYPES[dtype], f"{checkpoint.path}: {name}") for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors, stacked={})


def resize_vocabulary(checkpoint: LazyCheckpoint, size: int) -> LazyCheckpoint:
    """The checkpoint with a vocabulary of `size` ids.

    Existing ids keep their rows bit for bit, and specials their ids. A new id gets the mean of all rows, in the
    embedding and in the output projection: logits of existing ids don't change.

    Raises:
      UserError: a code or a special would be cut off.
    """
    old = checkpoint.vocabulary
    if size == old.size:
        return checkpoint
    specials = {name: token for name, token in special_ids(old).items() if token is not None}
    min_size = max([old.num_codes, *(token + 1 for token in specials.values())])
    if size < min_size:
        names = ", ".join(f"{name} {token}" for name, token in specials.items()) or "no specials"
        raise UserError(
            f"{checkpoint.path}: vocabulary size {size} would cut off some of {old.num_codes} codes and {names}; "
            f"use at least {min_size}"
        )
    axes = {"embedding": 0, "head": 1}
    resized = {name: _resize(t, axes[name], size) for name, t in checkpoint.tensors.items() if name in axes}
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, vocabulary_size=size),
        vocabulary=dataclasses.replace(old, size=size),
        tensors={**checkpoint.tensors, **resized},
    )


def _resize(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
    shape = tuple(size if i == axis else n for i, n in enumerate(tensor.shape))

    def read() -> np.ndarray:
        new = np.empty(shape, tensor.dtype)
        new_rows, old_rows = np.moveaxis(new, axis, 0), np.moveaxis(tensor.read(), axis, 0)
        new_rows[: len(old_rows)] = old_rows[:size]
        if size > len(old_rows):
            new_rows[len(old_rows) :] = old_rows.mean(0, dtype=np.float32).astype(tensor.dtype)
        return new

    return LazyTensor(shape, tensor.dtype, read)
