"""EasyLM's and LVM's checkpoints: a stream of arrays, and a config.json beside it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.interop import tensors as interop
from lvm.interop.config_fields import EASYLM as FAMILY
from lvm.interop.config_fields import LLAMA, config_of, record_of, save_beside
from lvm.interop.hugging_face import computed_as_stored
from lvm.interop.layouts import EASYLM
from lvm.interop.lazy_checkpoint import LazyCheckpoint, read_whole, vocabulary_of
from lvm.interop.stream import Key, read_stream, write_stream
from lvm.interop.tensors import LazyTensor
from lvm.training.workdir import CONFIG

PARAMS = "streaming_params"
_PREFIXES = ("streaming_params", "streaming_train_state")
_SUFFIXES = (".msgpack", ".easylm", ".stream")


def streams(names: Sequence[str]) -> list[str]:
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
    family = LLAMA if LLAMA.context in fields else FAMILY
    record, step = record_of(folder)
    config = config_of(fields, family, record, f"{folder / CONFIG}")
    vocabulary = vocabulary_of(folder, config.vocabulary_size)
    found = _parameters(file)
    interop.check(found, EASYLM.shapes(config), os.fspath(file))
    tensors = EASYLM.ours(found, config)
    read_whole(tensors, config, file)
    stored = LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(file))
    return stored if "model" in record.get("config", {}) else computed_as_stored(stored)


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


def write(folder: pathlib.Path, stored: LazyCheckpoint) -> None:
    """Writes such a folder's files."""
    if stored.config.kv_heads != stored.config.num_heads:
        log_info("EasyLM has no grouped key-value heads: its own code can't load this, ours can")
    tensors = EASYLM.theirs(stored.tensors)
    write_stream(folder / PARAMS, ((tuple(name.split(".")), tensor) for name, tensor in tensors.items()))
    files.write_json(folder / CONFIG, _config(stored))
    save_beside(folder, stored)


def _config(stored: LazyCheckpoint) -> dict[str, object]:
    specials = {f"{name}_token_id": getattr(stored.vocabulary, name) for name in ("bos", "eos", "pad")}
    return {**FAMILY.fields(stored.config), "rope_theta": stored.config.rope_theta, **specials}
