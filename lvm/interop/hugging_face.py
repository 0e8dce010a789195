"""Folders of transformers' `LlamaForCausalLM`: config.json, generation_config.json and weights, one file or shards."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.interop import tensors as interop
from lvm.interop.config_fields import LLAMA, config_of, record_of, save_beside
from lvm.interop.layouts import HUGGING_FACE
from lvm.interop.lazy_checkpoint import LazyCheckpoint, read_whole, vocabulary_of
from lvm.interop.tensors import LazyTensor
from lvm.interop.torch_reader import read_state_dict
from lvm.model.vocabulary import Vocabulary
from lvm.training.workdir import CONFIG

GENERATION_CONFIG = "generation_config.json"
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # of old versions: no parameters


def is_one(names: Sequence[str]) -> bool:
    """Whether a folder with such files is transformers'."""
    return any(_WEIGHTS.fullmatch(name) for name in names)


def read(folder: epath.Path) -> LazyCheckpoint:
    """The model of such a folder.

    Raises:
      UserError: another network than ours, a missing shard, tensors that are not the network's, or a vocabulary that
        nothing declares.
    """
    fields = files.read_json(folder / CONFIG)
    record, step = record_of(folder)
    config = config_of(fields, LLAMA, record, f"{folder / CONFIG}")
    vocabulary = vocabulary_of(folder, config.vocabulary_size)
    found = {name: tensor for name, tensor in _tensors(folder).items() if not _DERIVED.fullmatch(name)}
    if config.tie_embeddings:  # which some versions write twice
        found.pop(HUGGING_FACE.name("head"), None)
    interop.check(found, HUGGING_FACE.shapes(config), os.fspath(folder))
    tensors = HUGGING_FACE.ours(found, config)
    read_whole(tensors, config, folder)
    stored = LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(folder))
    return stored if "model" in record.get("config", {}) else computed_as_stored(stored)


def computed_as_stored(stored: LazyCheckpoint) -> LazyCheckpoint:
    """With the compute type of its tensors, where nothing else tells; float16 isn't one of ours."""
    dtype = "bfloat16" if stored.dtype == "bfloat16" else "float32"
    return dataclasses.replace(stored, config=dataclasses.replace(stored.config, dtype=dtype))


def _tensors(folder: epath.Path) -> dict[str, LazyTensor]:
    for name, read_file in ((SAFETENSORS, interop.read_safetensors), (TORCH, read_state_dict)):
        if (folder / name).exists():
            return read_file(folder / name)
        if (folder / f"{name}{INDEX}").exists():
            return _sharded(folder / f"{name}{INDEX}", read_file)
    raise UserError(
        f"{folder}: shards of weights without {SAFETENSORS}{INDEX} or {TORCH}{INDEX}, which says what is in which"
    )


def _sharded(index: epath.Path, read_file: Any) -> dict[str, LazyTensor]:
    read = files.read_json(index)
    places = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: no weight_map; expected an object of tensors' names and their files")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    outside = [name for name in names if pathlib.PurePath(name).name != name]
    if missing or outside:
        raise UserError(f"{index}: names {', '.join((outside or missing)[:8])}; not there beside it")
    shards = {name: read_file(index.parent / name) for name in names}
    absent = [f"{tensor} of {place}" for tensor, place in places.items() if tensor not in shards[place]]
    if absent:
        more = f"; and {len(absent) - 8} more" if len(absent) > 8 else ""
        raise UserError(f"{index}: names tensors that aren't in their files: {'; '.join(absent[:8])}{more}")
    return {tensor: shards[place][tensor] for tensor, place in places.items()}


def write(folder: pathlib.Path, stored: LazyCheckpoint, max_shard: int) -> None:
    """Writes such a folder's files, weights in shards of at most `max_shard` bytes each (or one tensor)."""
    tensors = HUGGING_FACE.theirs(stored.tensors)
    shards = list(_shards(tensors, max_shard))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = SAFETENSORS if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        interop.write_safetensors(folder / file, {name: tensors[name].read() for name in names})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        files.write_json(folder / f"{SAFETENSORS}{INDEX}", index)
    files.write_json(folder / CONFIG, _config(stored))
    files.write_json(folder / GENERATION_CONFIG, _generation_config(stored.vocabulary))
    save_beside(folder, stored)


def _shards(tensors: Mapping[str, LazyTensor], max_shard: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_shard:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _specials(vocabulary: Vocabulary) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(vocabulary, name) for name in ("bos", "eos", "pad")}


def _config(stored: LazyCheckpoint) -> dict[str, Any]:
    config = stored.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **LLAMA.fields(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 4 reads rope_theta and torch_dtype, 5 the others.
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": stored.dtype,
        "dtype": stored.dtype,
        **_specials(stored.vocabulary),
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    # Codes alone are images: generation gives no other id.
    suppressed = list(range(vocabulary.num_codes, vocabulary.size))
    return _specials(vocabulary) | {"suppress_tokens": suppressed}
