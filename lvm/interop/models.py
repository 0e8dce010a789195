"""Model folders: our workdirs, and the formats of transformers and EasyLM, detected by their contents."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.config import describe_changes
from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.data.store.manifest import same_codes
from lvm.interop import easylm, hugging_face, workdirs
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.interop.tensors import checked
from lvm.model.vocabulary import Vocabulary
from lvm.training.workdir import CONFIG

FORMATS = ("hf", "orbax", "easylm")
_ADAPTER = "adapter"  # peft's files: adapter_config.json, adapter_model.safetensors
MAX_SHARD_BYTES = 2 * 10**9


def read(folder: epath.PathLike, step: int | None = None) -> LazyCheckpoint:
    """Opens the checkpoint in a model folder. Reading a tensor raises UserError if it isn't finite.

    Args:
      folder: a workdir, a folder of transformers' Llama or of EasyLM; or the file of a streaming checkpoint, with
        its config.json beside it.
      step: a step of the workdir; the newest by default.

    Raises:
      UserError: not a model folder, an unsupported network, or tensors that are not the network's.
    """
    path = epath.Path(folder)
    format, stream = _detect_format(path)
    if format == "orbax":
        return _checked(workdirs.read(path, step))
    if step is not None:
        raise UserError(f"{path}: not a workdir: it holds one checkpoint, and no step can be chosen")
    return _checked(hugging_face.read(path) if stream is None else easylm.read(stream))


def _checked(checkpoint: LazyCheckpoint) -> LazyCheckpoint:
    tensors, stacked = (
        {name: checked(tensor, f"{checkpoint.path}: {name}") for name, tensor in group.items()}
        for group in (checkpoint.tensors, checkpoint.stacked)
    )
    return dataclasses.replace(checkpoint, tensors=tensors, stacked=stacked)


def _detect_format(path: epath.Path) -> tuple[str, epath.Path | None]:
    """The format of a folder or file, and EasyLM's streaming checkpoint."""
    if path.name.startswith(f"{_ADAPTER}_model.") or (
        (path / f"{_ADAPTER}_config.json").exists() and not (path / CONFIG).exists()
    ):
        raise UserError(
            f"{path}: an adapter, which holds changes of a model's weights; merge it first: "
            "peft_model.merge_and_unload().save_pretrained(FOLDER) (docs/interop.md)"
        )
    if path.is_file():
        if hugging_face.has_weights([path.name]):
            raise UserError(f"{path}: a weights file; give its folder, {path.parent}")
        return "easylm", path
    if not (path / CONFIG).exists():
        problem = f"not a model folder: {CONFIG} is missing" if path.exists() else "doesn't exist"
        raise UserError(
            f"{path}: {problem}; expected a workdir of lvm training, or a folder of transformers or EasyLM with weights"
        )
    fields = files.read_json(path / CONFIG)
    if not isinstance(fields, dict):
        raise UserError(f"{path / CONFIG}: holds a {type(fields).__name__}; expected an object")
    if "kind" in fields:
        return "orbax", None
    if "_class_name" in fields:
        raise UserError(f"{path / CONFIG}: _class_name: {fields['_class_name']!r} is a tokenizer; expected a model")
    names = [file.name for file in path.iterdir() if file.is_file()]
    if hugging_face.has_weights(names):
        return "hf", None
    streams = easylm.list_streams(names)
    if len(streams) == 1:
        return "easylm", path / streams[0]
    raise UserError(
        f"{path}: weights: {', '.join(streams) or 'none'}; expected model.safetensors, pytorch_model.bin, shards with "
        "their index, or one EasyLM stream such as streaming_params (or give the path of one)"
    )


def write(
    folder: epath.PathLike,
    checkpoint: LazyCheckpoint,
    format: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finalize: Callable[[pathlib.Path], None] = lambda folder: None,
) -> None:
    """Writes a new model folder atomically.

    Args:
      format: one of `FORMATS`.
      max_shard_bytes: size of a weights file, for "hf".
      finalize: called with the temporary folder before it is renamed, to add files.

    Raises:
      UserError: the folder exists and isn't empty, or the format can't hold a tensor.
      OSError: the disk is full.
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
    expected: Mapping[str, Any] | None, vocabulary: Vocabulary, identity: Mapping[str, Any], folder: epath.PathLike
) -> None:
    """Checks that a tokenizer gives the codes that a model was trained with, or as many if these are unknown.

    `expected` is the tokenizer's identity in the model's run record, `identity` the `Tokenizer.identity()` of that in
    `folder`. Raises UserError for another tokenizer; its decoder may be another.
    """
    if expected and not same_codes(identity, expected):
        changes = describe_changes(*({**each, "hash": "", "codes": ""} for each in (expected, identity)))
        raise UserError(f"{folder}: not the tokenizer that the model was trained with ({changes})")
    if identity["num_codes"] != vocabulary.num_codes:
        raise UserError(f"{folder}: {identity['num_codes']} codes, but the model has {vocabulary.num_codes}")
    if not expected:
        log_warning(f"{folder}: can't be verified: the model's tokenizer isn't recorded")
