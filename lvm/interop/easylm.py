"""EasyLM's and LVM's checkpoints: a streaming checkpoint, and a config.json beside it."""

import pathlib
from collections.abc import Sequence

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.interop.config_fields import EASYLM_CONTEXT, LLAMA_CONTEXT, common_fields, read_checkpoint, write_record
from lvm.interop.easylm_stream import Key, read_stream, write_stream
from lvm.interop.layouts import EASYLM
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.interop.tensors import LazyTensor, format_names
from lvm.training.workdir import CONFIG

PARAMS = "streaming_params"
_PREFIXES = ("streaming_params", "streaming_train_state")
_SUFFIXES = (".msgpack", ".easylm", ".stream")


def list_streams(names: Sequence[str]) -> list[str]:
    """The streaming checkpoints among file names, sorted."""
    return sorted(name for name in names if name.startswith(_PREFIXES) or name.endswith(_SUFFIXES))


def read(file: epath.Path) -> LazyCheckpoint:
    """Opens a streaming checkpoint, `streaming_params` or `streaming_train_state` under any name.

    Raises:
      UserError: no config.json beside it, an unsupported network, a truncated stream, tensors that are not the
        network's, or an unknown vocabulary.
    """
    path = file.parent / CONFIG
    if not path.exists():
        raise UserError(f"{path}: not found; a stream has no model sizes, so it needs one (docs/interop.md)")
    fields = files.read_json(path)
    context_field = LLAMA_CONTEXT if LLAMA_CONTEXT in fields else EASYLM_CONTEXT
    return read_checkpoint(file.parent, file, fields, context_field, EASYLM, lambda _: _open_parameters(file))


def _open_parameters(file: epath.Path) -> dict[str, LazyTensor]:
    """The parameters by dotted name; of a train state, its `params` alone."""
    entries = read_stream(file)
    if any(key[:2] == ("params", "params") for key in entries):
        prefix: Key = ("params", "params")
    else:
        prefix = ("params",) if any(key[0] == "params" for key in entries) else ()
    parameters = {".".join(key[len(prefix) :]): value for key, value in entries.items() if key[: len(prefix)] == prefix}
    others = [name for name, value in parameters.items() if value is None]
    if others:
        raise UserError(f"{file}: not arrays: {format_names(others)}")
    return {name: value for name, value in parameters.items() if value is not None}


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes a streaming checkpoint and its config.json."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if config.kv_heads != config.num_heads:
        log_warning("EasyLM doesn't support grouped key-value heads: its own code can't load this checkpoint")
    tensors = EASYLM.export_tensors(checkpoint.tensors)
    write_stream(folder / PARAMS, ((tuple(name.split(".")), tensor) for name, tensor in tensors.items()))
    files.write_json(folder / CONFIG, common_fields(config, vocabulary, EASYLM_CONTEXT))
    write_record(folder, checkpoint)
