"""Our own workdirs as lazy checkpoints: stacked tensors are read and written one layer at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict
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
from lvm.training.checkpoint import intact_step, open_params, save_lazy_params
from lvm.training.workdir import CONFIG, read_record


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
    tensors, stacked = _tensors(folder, step, config)
    check_tensors(tensors, config, f"{folder}: step {step}")
    return LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(folder), stacked)


def _tensors(
    folder: epath.Path, step: int, config: ModelConfig
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The parameters, one tensor a layer; and those stored stacked."""
    tensors: dict[str, LazyTensor] = {}
    stacked: dict[str, LazyTensor] = {}
    for name, array in open_params(folder, step, stacked_shapes(config)).items():
        shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        tensor = LazyTensor(shape, dtype, functools.partial(_read, array, ...))
        if not name.startswith("layers."):
            tensors[name] = tensor
            continue
        stacked[name] = tensor
        if shape[0] != config.num_layers:
            raise UserError(
                f"{folder}: step {step}: {name} {list(shape)}, expected {config.num_layers} layers"
            )
        for index, layer_name in enumerate(layer_names(name, config)):
            tensors[layer_name] = LazyTensor(shape[1:], dtype, functools.partial(_read, array, index))
    return {name: tensors[name] for name in tensor_shapes(config)}, stacked


def _read(array: Any, index: Any) -> np.ndarray:
    return np.asarray(array[index].read().result())


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes a workdir with one checkpoint, of parameters alone: training can start from it, not resume in it."""
    tree = dataclasses.replace(checkpoint, stacked={}).tree()  # layer by layer, even if stored stacked
    save_lazy_params(folder, checkpoint.step, tree)
    checkpoint.vocabulary.save(folder)
    files.write_json(folder / CONFIG, {**checkpoint.export_record(), "converted": True})
