"""Our own checkpoints, a layer at a time: stacked tensors are read by slices, and written one after the other."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.interop.lazy_checkpoint import (
    LazyCheckpoint,
    check_tensors,
    layer_names,
    stacked_shapes,
    tensor_shapes,
)
from lvm.interop.tensors import LazyTensor
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training import checksums
from lvm.training.checkpoint import CHECKSUMS, FOLDER, chunked_save_args, intact_step
from lvm.training.workdir import CONFIG, read_record

_CACHE = 2**28  # bytes of chunks that stay in memory, for those that hold several small layers


def read(folder: epath.Path, step: int | None = None) -> LazyCheckpoint:
    """The model of a workdir's newest checkpoint, or that of `step`.

    Raises:
      UserError: not a workdir of a transformer's training, no such checkpoint, or a damaged one.
    """
    record = read_record(folder, "lvm", ("config", "tokenizer", "stores", "sources"))
    vocabulary = Vocabulary.load(folder)
    model = {**record["config"]["model"], "vocabulary_size": vocabulary.size}
    config = from_config_dict(ModelConfig, model, f"{folder / CONFIG}: config.model")
    step = intact_step(folder, step)
    place = folder / FOLDER / str(step)
    tensors, whole = _tensors(place / "params", config)
    check_tensors(tensors, config, place)
    return LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(folder), whole)


def _tensors(folder: epath.Path, config: ModelConfig) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The parameters, one a layer; and the stacked ones."""
    found: dict[str, LazyTensor] = {}
    whole: dict[str, LazyTensor] = {}
    for name, array in open_arrays(folder, config).items():
        shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        tensor = LazyTensor(shape, dtype, functools.partial(_read, array, ...))
        if not name.startswith("layers."):
            found[name] = tensor
            continue
        whole[name] = tensor
        if shape[0] != config.num_layers:
            raise UserError(f"{folder}: {name} {list(shape)}, expected {config.num_layers} layers")
        for number, layer in enumerate(layer_names(name, config)):
            found[layer] = LazyTensor(shape[1:], dtype, functools.partial(_read, array, number))
    return {name: found[name] for name in tensor_shapes(config)}, whole


def open_arrays(folder: epath.Path, config: ModelConfig) -> dict[str, Any]:
    """The arrays of a checkpoint's `params` folder as they are stored, by their dotted names; nothing is read yet.

    Raises:
      UserError: one isn't there.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    base = os.fspath(folder.resolve())
    base = base if "://" in base else f"file://{base}"
    found = {}
    for name, shape in stacked_shapes(config).items():
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        try:
            found[name] = tensorstore.open(spec, context=context, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: doesn't hold {name} {list(shape)}") from error
    return found


def _read(array: Any, index: Any) -> np.ndarray:
    return np.asarray(array[index].read().result())


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes tensors as Orbax writes arrays, but one layer is in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[LazyTensor], infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value], [info], [arg]):
                await asyncio.to_thread(written.result)
        return []

    async def _open_and_write(self, value: LazyTensor, tspec: Any, ts_context: Any) -> None:
        """What Orbax calls of each array, with where it goes."""
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for number, part in enumerate(value.slices):
            await array[number].write(part.read())
        if not value.slices:
            await array.write(value.read())


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes a workdir with one checkpoint, of parameters alone: training can't go on in it, but begin with it."""
    tensors = dataclasses.replace(checkpoint, stacked={}).tree()
    registry = ocp.type_handlers.create_type_handler_registry((LazyTensor, _OneByOne()))
    with ocp.CheckpointManager(
        folder / FOLDER,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "training": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(tensors, save_args=chunked_save_args(tensors)),
            training=ocp.args.StandardSave({"step": np.int32(checkpoint.step)}),
            meta=ocp.args.JsonSave({"converted": True}),
        )
        manager.save(checkpoint.step, args=items)
    place = epath.Path(folder)
    checksums.write(place / FOLDER / str(checkpoint.step), place / CHECKSUMS / f"{checkpoint.step}.json")
    checkpoint.vocabulary.save(folder)
    config = {**checkpoint.record.get("config", {}), "model": to_json(checkpoint.config)}
    files.write_json(folder / CONFIG, {**checkpoint.record, "config": config, "converted": True})
