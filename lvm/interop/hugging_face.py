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
from lvm.interop.config_fields import LLAMA, parse_config, read_record, write_record
from lvm.interop.layouts import HUGGING_FACE
from lvm.interop.lazy_checkpoint import LazyCheckpoint, check_tensors, load_vocabulary
from lvm.interop.tensors import LazyTensor, check_shapes, read_safetensors, write_safetensors
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


def has_weights(names: Sequence[str]) -> bool:
    """Whether a folder with such files is transformers'."""
    return any(_WEIGHTS.fullmatch(name) for name in names)


def read(folder: epath.Path) -> LazyCheckpoint:
    """The model of such a folder.

    Raises:
      UserError: another network than ours, a missing shard, tensors that are not the network's, or a vocabulary that
        nothing declares.
    """
    fields = files.read_json(folder / CONFIG)
    record, step = read_record(folder)
    config = parse_config(fields, LLAMA, record, f"{folder / CONFIG}")
    vocabulary = load_vocabulary(folder, config.vocabulary_size)
    found = {name: tensor for name, tensor in _tensors(folder).items() if not _DERIVED.fullmatch(name)}
    if config.tie_embeddings:  # which some versions write twice
        found.pop(HUGGING_FACE.name("head"), None)
    check_shapes(found, HUGGING_FACE.shapes(config), os.fspath(folder))
    tensors = HUGGING_FACE.import_tensors(found, config)
    check_tensors(tensors, config, folder)
    checkpoint = LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(folder))
    return checkpoint if "model" in record.get("config", {}) else infer_compute_dtype(checkpoint)


def infer_compute_dtype(checkpoint: LazyCheckpoint) -> LazyCheckpoint:
    """With the compute type of its tensors, where nothing else tells; float16 isn't one of ours."""
    dtype = "bfloat16" if checkpoint.dtype == "bfloat16" else "float32"
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, dtype=dtype))


def _tensors(folder: epath.Path) -> dict[str, LazyTensor]:
    for name, read_file in ((SAFETENSORS, read_safetensors), (TORCH, read_state_dict)):
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


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint, max_shard_bytes: int) -> None:
    """Writes such a folder's files, weights in shards of at most `max_shard_bytes` bytes each (or one tensor)."""
    tensors = HUGGING_FACE.export_tensors(checkpoint.tensors)
    shards = list(_shards(tensors, max_shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = SAFETENSORS if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name].read() for name in names})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        files.write_json(folder / f"{SAFETENSORS}{INDEX}", index)
    files.write_json(folder / CONFIG, _config(checkpoint))
    files.write_json(folder / GENERATION_CONFIG, _generation_config(checkpoint.vocabulary))
    write_record(folder, checkpoint)


def _shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _specials(vocabulary: Vocabulary) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(vocabulary, name) for name in ("bos", "eos", "pad")}


def _config(checkpoint: LazyCheckpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **LLAMA.to_fields(config),
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
        "torch_dtype": checkpoint.dtype,
        "dtype": checkpoint.dtype,
        **_specials(checkpoint.vocabulary),
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    # Codes alone are images: generation gives no other id.
    suppressed = list(range(vocabulary.num_codes, vocabulary.size))
    return _specials(vocabulary) | {"suppress_tokens": suppressed}
