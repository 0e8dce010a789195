"""Transformers in folders: our workdirs and what others load, read by what is in them, and written."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.interop import easylm, hugging_face, workdirs
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.model.vocabulary import Vocabulary
from lvm.training.workdir import CONFIG

FORMATS = ("hf", "orbax", "easylm")
MAX_SHARD_BYTES = 2 * 10**9  # bytes


def read(folder: epath.PathLike, step: int | None = None) -> LazyCheckpoint:
    """The model in a folder of any kind, or in a stream whose file is given and has its config.json beside it.

    Args:
      folder: a workdir, a folder of transformers' Llama, or EasyLM's.
      step: of the workdir's checkpoints; the newest by default.

    Raises:
      UserError: not such a folder, a model that can't be built, or tensors that are not the model's.
    """
    path = epath.Path(folder)
    format, file = _detect_format(path)
    if format == "orbax":
        return workdirs.read(path, step)
    if step is not None:
        raise UserError(f"{path}: holds one model; a step is chosen of a workdir's checkpoints alone")
    return hugging_face.read(path) if file is None else easylm.read(file.parent, file)


def _detect_format(path: epath.Path) -> tuple[str, epath.Path | None]:
    """What a folder is, and its stream if it is EasyLM's."""
    if path.is_file():
        if hugging_face.has_weights([path.name]):
            raise UserError(f"{path}: a file of weights; give its folder, {path.parent}")
        return "easylm", path
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path}: not a model folder: {CONFIG} is missing; wanted a workdir of lvm training, or a folder of "
            "transformers' or EasyLM's with weights beside it"
        )
    fields = files.read_json(path / CONFIG)
    if not isinstance(fields, dict):
        raise UserError(f"{path / CONFIG}: holds a {type(fields).__name__}; expected an object")
    if "kind" in fields:
        return "orbax", None
    if "_class_name" in fields:
        raise UserError(
            f"{path / CONFIG}: _class_name: {fields['_class_name']!r}: a tokenizer's, wanted a model's"
        )
    names = [file.name for file in path.iterdir() if file.is_file()]
    if hugging_face.has_weights(names):
        return "hf", None
    found = easylm.list_streams(names)
    if len(found) == 1:
        return "easylm", path / found[0]
    raise UserError(
        f"{path}: weights: {', '.join(found) or 'none'}; wanted model.safetensors, pytorch_model.bin, shards with "
        "their index, or one EasyLM stream such as streaming_params (or give its path)"
    )


def write(
    folder: epath.PathLike,
    checkpoint: LazyCheckpoint,
    format: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finalize: Callable[[pathlib.Path], None] = lambda folder: None,
) -> None:
    """Writes a new folder of that kind of `FORMATS`; it is there as a whole or not at all.

    Args:
      folder: to write.
      stored: the model.
      kind: one of `FORMATS`.
      max_shard_bytes: bytes of a file of weights, for "hf".
      finish: adds files of its own to the folder, before it gets its name.

    Raises:
      UserError: the folder exists and isn't empty, or a tensor can't be written so.
      OSError: the disk takes no more.
    """
    with files.clear_disk_errors(folder), files.new_folder(folder) as temporary:
        if format == "hf":
            hugging_face.write(temporary, checkpoint, max_shard_bytes)
        elif format == "easylm":
            easylm.write(temporary, checkpoint)
        else:
            workdirs.write(temporary, checkpoint)
        finalize(temporary)


def check_tokenizer(
    known: Mapping[str, Any] | None,
    vocabulary: Vocabulary,
    identity: Mapping[str, Any],
    folder: epath.PathLike,
) -> None:
    """That a tokenizer is the one whose codes a model learned; where nothing tells, that it has as many codes.

    Args:
      known: the identity that the model's record has, or None.
      vocabulary: the model's.
      identity: `Tokenizer.identity()`.
      folder: the tokenizer's, for the error.

    Raises:
      UserError: it is another.
    """
    if known and identity["hash"] != known["hash"]:
        raise UserError(f"{folder}: not the tokenizer that the model was trained with")
    if identity["num_codes"] != vocabulary.num_codes:
        raise UserError(
            f"{folder}: a tokenizer of {identity['num_codes']} codes, the model has {vocabulary.num_codes}"
        )
    if not known:
        log_info(f"{folder}: the model doesn't tell its tokenizer; this one is taken on trust")
