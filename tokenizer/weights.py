"""Tokenizers in folders: our own workdirs and the published layouts, read by what is in them, and written.

Every folder has a `config.json`. Ours says `kind`; the published ones say their class, `_class_name`; beside a bare
weights file a small one says `variant` (docs/interop.md). A `preprocess.json` tells how pictures become images; without
one it is as the network's authors did.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
from etils import epath

from lvm import __version__
from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.preprocess import Preprocess
from lvm.interop.tensors import (
    BFLOAT16,
    LazyTensor,
    check_shapes,
    from_array,
    read_safetensors,
    write_safetensors,
)
from lvm.interop.torch_reader import read_state_dict
from lvm.model.nnx_utils import Params
from lvm.training.checkpoint import Checkpoints, load_params
from lvm.training.workdir import CONFIG, RECORD_VERSION, read_record
from tokenizer import layouts
from tokenizer.layout_fields import from_variant_fields, variant_of
from tokenizer.layouts import Layout
from tokenizer.network import VQGANConfig

KINDS = ("orbax", "torch", "diffusers", "maskgit")
PREPROCESS = "preprocess.json"
_MODES = {"maskgit": "center_crop", "lvm_old": "squash", "lvm": "squash"}  # as their authors prepare images
_NAMES = {
    "torch": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "maskgit": "tokenizer.msgpack",
}
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", "")
_KINDS_OF_CLASS = {"VQGANModel": "torch", "VQModel": "diffusers"}
_WIDENED = (np.dtype(np.float16), BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A tokenizer at rest.

    Attributes:
      config: the network.
      preprocess: how pictures become its images.
      params: its parameters, a nested dict of float32 arrays.
      step: of the training that made them; 0 where nothing tells.
    """

    config: VQGANConfig
    preprocess: Preprocess
    params: Params
    step: int = 0


def read(folder: epath.PathLike) -> Weights:
    """The tokenizer in a folder of any kind, or whose weights file is given and has its config.json beside it.

    Raises:
      UserError: not such a folder, a network that can't be built, or tensors that are not the network's.
    """
    path = epath.Path(folder)
    if path.is_file():
        return _read_published(path.parent, path)
    if path.is_dir() and "kind" not in _fields(path):
        return _read_published(path, None)
    record = read_record(path, "tokenizer", ("config", "preprocess"))
    config = from_config_dict(VQGANConfig, record["config"]["model"], f"{path / CONFIG}: config.model")
    preprocess = Preprocess.from_json(record["preprocess"])
    params, step = load_params(path, layouts.param_shapes(config))
    return Weights(config, preprocess, params, step)


def write(folder: epath.PathLike, weights: Weights, kind: str) -> None:
    """Writes a new folder of that kind of `KINDS`; it is there as a whole or not at all.

    Raises:
      UserError: the folder exists and isn't empty, or the network can't be told in that kind of folder.
    """
    layout = None if kind == "orbax" else _layout_for(weights.config, kind)
    with files.new_folder(folder) as temporary:
        if layout is None:
            _write_workdir(temporary, weights)
        else:
            _write_published(temporary, weights, layout)


# --- Published layouts ------------------------------------------------------------------------------------------


def _read_published(folder: epath.Path, file: epath.Path | None) -> Weights:
    fields = _fields(folder)
    file = file or _weights_file(folder)
    content = _content(file)
    layout = _layout_of(fields, content, f"{folder / CONFIG}")
    preprocess = _preprocess(folder)
    if preprocess and layout.kind == "diffusers":  # whose sample_size is often left at its default
        fields = {**fields, "sample_size": preprocess.resolution}
    config = layout.from_fields(fields, f"{folder / CONFIG}")
    preprocess = preprocess or Preprocess(config.resolution, _MODES[layout.variant])
    if preprocess.resolution != config.resolution:
        raise UserError(
            f"{folder / PREPROCESS}: resolution: {preprocess.resolution}, {CONFIG} says {config.resolution}"
        )
    names = layout.tensors(config)
    found = _open(file, content)
    check_shapes(found, {name: shape for name, (_, shape) in names.items()}, os.fspath(file))
    _check_dtypes(found, file)
    params = {path: _parameter(found[name], layout) for name, (path, _) in names.items()}
    return Weights(config, preprocess, layouts.unflatten(params))


def _preprocess(folder: epath.Path) -> Preprocess | None:
    path = folder / PREPROCESS
    if not path.exists():
        return None
    try:
        return Preprocess.from_json(files.read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parameter(tensor: LazyTensor, layout: Layout) -> jnp.ndarray:
    array = tensor.read().transpose(np.argsort(layout.axes(len(tensor.shape))))
    return jnp.asarray(np.ascontiguousarray(array, np.float32))


def _check_dtypes(found: Mapping[str, LazyTensor], file: epath.Path) -> None:
    dtypes = {tensor.dtype for tensor in found.values()} - {np.dtype(np.float32)}
    refused = dtypes - set(_WIDENED)
    if refused:
        names = [f"{name} {tensor.dtype}" for name, tensor in found.items() if tensor.dtype in refused]
        raise UserError(f"{file}: {'; '.join(names[:8])}; expected float32, or half precision to be widened")
    for dtype in sorted(map(str, dtypes)):
        log_info(f"{file}: tensors in {dtype} are widened to float32")


def _layout_of(fields: Mapping[str, Any], content: str, where: str) -> Layout:
    if "variant" in fields:
        kind = "maskgit" if content == "msgpack" else "torch"
        layout = layouts.find_layout(fields["variant"], kind)
        if layout is None:
            raise UserError(
                f"{where}: variant: {fields['variant']!r} beside a {content} file; expected one of "
                f"{', '.join(_MODES)}, of which maskgit alone comes as msgpack"
            )
        return dataclasses.replace(layout, from_fields=from_variant_fields)
    known = _KINDS_OF_CLASS.get(fields.get("_class_name", ""))
    layout = layouts.find_layout("lvm", known) if known else None
    if layout is None:
        raise UserError(
            f"{where}: not a tokenizer's: it has {', '.join(sorted(fields)) or 'nothing'}; expected kind (a workdir), "
            f"_class_name of {' or '.join(_KINDS_OF_CLASS)}, or variant (docs/interop.md)"
        )
    return layout


def _fields(folder: epath.Path) -> Mapping[str, Any]:
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{folder}: {CONFIG} is missing; a bare weights file needs a small one beside it, such as "
            '{"variant": "maskgit"} (docs/interop.md)'
        )
    fields = files.read_json(folder / CONFIG)
    if not isinstance(fields, dict):
        raise UserError(f"{folder / CONFIG}: holds a {type(fields).__name__}; expected an object")
    return fields


def _weights_file(folder: epath.Path) -> epath.Path:
    """The one weights file of a folder; safetensors where there is the same in torch's format too."""
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _SUFFIXES and f.name[0] != ".")
    found = [file for file in found if file.name not in ("LICENSE", "README")]
    best = [file for file in found if file.suffix == ".safetensors"] or found
    if len(best) == 1:
        return best[0]
    what = ", ".join(file.name for file in best) or "none"
    raise UserError(
        f"{folder}: weights files: {what}; expected one (or give its path), of {' '.join(_SUFFIXES)}"
    )


def _content(file: epath.Path) -> str:
    """What a weights file is, by its content."""
    with open(file, "rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":  # after eight bytes of its length, the header
        return "safetensors"
    older = start[:4] == b"\x80\x02\x8a\x0a"  # what torch.save wrote before its zip files
    return "torch" if older or zipfile.is_zipfile(file) else "msgpack"


def _open(file: epath.Path, content: str) -> dict[str, LazyTensor]:
    if content == "torch":
        return read_state_dict(file)
    if content == "safetensors":
        return read_safetensors(file)
    try:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack's are of many kinds
        raise UserError(f"{file}: not weights in msgpack, safetensors or torch's format: {error}") from error
    tree = tree.get("params", tree) if isinstance(tree, dict) else {}
    flat = {".".join(map(str, path)): leaf for path, leaf in layouts.flatten(tree).items()}
    others = [name for name, leaf in flat.items() if not isinstance(leaf, np.ndarray)]
    if others or not flat:
        raise UserError(f"{file}: {', '.join(others[:8]) or 'nothing'}: expected a tree of arrays")
    return {name: from_array(leaf) for name, leaf in flat.items()}


def _layout_for(config: VQGANConfig, kind: str) -> Layout:
    variant = variant_of(config)
    layout = layouts.find_layout(variant, kind)
    if layout is None:
        known = ", ".join(["orbax", *layouts.layout_kinds(variant)])
        what = f"variant {variant}" if variant else "a network of our own"
        raise UserError(f"{what} has no layout {kind!r}; it can be written as {known}")
    told = to_json(layout.from_fields(files.as_json(layout.to_fields(config)), f"{kind} layout"))
    meant = to_json(config) | {"compute_dtype": told["compute_dtype"]}
    lost = [
        f"{key}: {value!r} would be read as {told[key]!r}"
        for key, value in meant.items()
        if told[key] != value
    ]
    if lost:
        raise UserError(f"the {kind} layout of {variant} can't tell this network: {'; '.join(lost)}")
    return layout


def to_layout(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
    """Every tensor as the layout names it and lays it out."""
    flat = layouts.flatten(weights.params)
    found = {}
    for name, (path, _) in layout.tensors(weights.config).items():
        array = np.asarray(flat[path])
        found[name] = np.ascontiguousarray(array.transpose(layout.axes(array.ndim)))
    return found


def _write_published(folder: pathlib.Path, weights: Weights, layout: Layout) -> None:
    tensors, file = to_layout(weights, layout), folder / _NAMES[layout.kind]
    if layout.kind == "maskgit":
        tree = layouts.unflatten({tuple(name.split(".")): array for name, array in tensors.items()})
        files.write_atomically(file, flax.serialization.msgpack_serialize({"params": tree}))
    else:
        write_safetensors(file, tensors)
    files.write_json(folder / CONFIG, layout.to_fields(weights.config))
    files.write_json(folder / PREPROCESS, weights.preprocess.to_json())


# --- Our own ----------------------------------------------------------------------------------------------------


def _write_workdir(folder: pathlib.Path, weights: Weights) -> None:
    record = {
        "version": RECORD_VERSION,
        "lvm_version": __version__,
        "kind": "tokenizer",
        "config": {"model": to_json(weights.config)},
        "preprocess": weights.preprocess.to_json(),
        "converted": True,  # there is no training to go on with: a new run begins with these weights
    }
    checkpoints = Checkpoints(folder)
    state = {"params": weights.params, "training": {"step": np.int32(weights.step)}}
    checkpoints.save(state, weights.step, {"converted": True})
    checkpoints.close()
    files.write_json(folder / CONFIG, record)
