"""EasyLM's and LVM's checkpoints: a stream of arrays, and a config.json beside it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.interop.config_fields import EASYLM as FAMILY
from lvm.interop.config_fields import LLAMA, parse_config, read_record, write_record
from lvm.interop.easylm_stream import Key, read_stream, write_stream
from lvm.interop.hugging_face import infer_compute_dtype
from lvm.interop.layouts import EASYLM
from lvm.interop.lazy_checkpoint import LazyCheckpoint, check_tensors, load_vocabulary
from lvm.interop.tensors import LazyTensor, check_shapes
from lvm.training.workdir import CONFIG

PARAMS = "streaming_params"
_PREFIXES = ("streaming_params", "streaming_train_state")
_SUFFIXES = (".msgpack", ".easylm", ".stream")


def list_streams(names: Sequence[str]) -> list[str]:
    """The files of a folder that are such streams, by their names."""
    return sorted(name for name in names if name.startswith(_PREFIXES) or name.endswith(_SUFFIXES))


def read(folder: epath.Path, file: epath.Path) -> LazyCheckpoint:
    """The model of a stream, `streaming_params` or `streaming_train_state` under any name, in its folder.

    Raises:
      UserError: no config.json, another network than ours, a stream that ends too early, tensors that are not the
        network's, or a vocabulary that nothing declares.
    """
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{folder}: {CONFIG} is missing; a stream doesn't tell the model's sizes (docs/interop.md)"
        )
    fields = files.read_json(folder / CONFIG)
    family = LLAMA if LLAMA.context_field in fields else FAMILY
    record, step = read_record(folder)
    config = parse_config(fields, family, record, f"{folder / CONFIG}")
    vocabulary = load_vocabulary(folder, config.vocabulary_size)
    found = _parameters(file)
    check_shapes(found, EASYLM.shapes(config), os.fspath(file))
    tensors = EASYLM.import_tensors(found, config)
    check_tensors(tensors, config, file)
    checkpoint = LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(file))
    return checkpoint if "model" in record.get("config", {}) else infer_compute_dtype(checkpoint)


def _parameters(file: epath.Path) -> dict[str, LazyTensor]:
    """The parameters of a stream by their dotted names: of a train state, its `params` alone."""
    found = read_stream(file)
    if any(key[:2] == ("params", "params") for key in found):
        prefix: Key = ("params", "params")
    else:
        prefix = ("params",) if any(key[0] == "params" for key in found) else ()
    mine = {key[len(prefix) :]: value for key, value in found.items() if key[: len(prefix)] == prefix}
    others = ["/".join(key) for key, value in mine.items() if value is None]
    if others:
        raise UserError(f"{file}: {', '.join(others[:8])}: no arrays")
    return {".".join(key): value for key, value in mine.items() if value is not None}


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes such a folder's files."""
    if checkpoint.config.kv_heads != checkpoint.config.num_heads:
        log_info("EasyLM has no grouped key-value heads: its own code can't load this, ours can")
    tensors = EASYLM.export_tensors(checkpoint.tensors)
    write_stream(folder / PARAMS, ((tuple(name.split(".")), tensor) for name, tensor in tensors.items()))
    files.write_json(folder / CONFIG, _config(checkpoint))
    write_record(folder, checkpoint)


def _config(checkpoint: LazyCheckpoint) -> dict[str, object]:
    specials = {f"{name}_token_id": getattr(checkpoint.vocabulary, name) for name in ("bos", "eos", "pad")}
    return {**FAMILY.to_fields(checkpoint.config), "rope_theta": checkpoint.config.rope_theta, **specials}
