"""Our own workdirs as lazy checkpoints: stacked tensors are read and written one layer at a time."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict
from lvm.interop import lazy_checkpoint
from lvm.interop.lazy_checkpoint import LazyCheckpoint, check_dtypes, stacked_shapes
from lvm.interop.tensors import LazyTensor, check_shapes
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.checkpoint import intact_step, open_params, save_lazy_params
from lvm.training.workdir import CONFIG, read_record


def read(folder: epath.Path, step: int | None = None) -> LazyCheckpoint:
    """Opens the newest checkpoint of a transformer's workdir, or that of `step`.

    Raises UserError for any other folder, no such checkpoint, or a damaged one.
    """
    record = read_record(folder, "lvm", ("config", "tokenizer", "stores", "sources"))
    vocabulary = Vocabulary.load(folder)
    model = {**record["config"]["model"], "vocabulary_size": vocabulary.size}
    config = from_config_dict(ModelConfig, model, f"{folder / CONFIG}: config.model")
    step = intact_step(folder, step)
    shapes = stacked_shapes(config)
    arrays = open_params(folder, step, shapes)
    params = {name: _lazy_tensor(array) for name, array in arrays.items()}
    check_shapes(params, shapes, f"{folder}: step {step}")
    check_dtypes(params, f"{folder}: step {step}")
    stacked = {name: params.pop(name) for name in shapes if name.startswith("layers.")}
    for name in stacked:
        layers = enumerate(lazy_checkpoint.layer_names(name, config))
        params |= {layer: _lazy_tensor(arrays[name], index) for index, layer in layers}
    tensors = {name: params[name] for name in lazy_checkpoint.tensor_shapes(config)}
    return LazyCheckpoint(config, vocabulary, tensors, record, step, os.fspath(folder), stacked)


def _lazy_tensor(array: Any, layer: int | None = None) -> LazyTensor:
    """A tensor of a `tensorstore.TensorStore`, or a layer of it."""
    view = array if layer is None else array[layer]
    return LazyTensor(tuple(view.shape), np.dtype(view.dtype.numpy_dtype), lambda: np.asarray(view.read().result()))


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes a workdir with one checkpoint, of parameters alone: training can start from it, not resume in it."""
    tree = dataclasses.replace(checkpoint, stacked={}).tree()  # layer by layer, even if stored stacked
    save_lazy_params(folder, checkpoint.step, tree)
    checkpoint.vocabulary.save(folder)
    files.write_json(folder / CONFIG, {**checkpoint.export_record(), "converted": True})
