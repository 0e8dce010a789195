"""Reads and writes tokenizer folders: our workdirs and published layouts, recognized by their config.json.

A workdir's config.json has `kind`, a published one its class (`_class_name`), and a small one beside a bare weights
file `variant` (docs/interop.md). `preprocess.json` holds the preprocessing; default: that of the network's authors.
"""

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
from flax.traverse_util import flatten_dict, unflatten_dict

from lvm import __version__
from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.data.images.preprocess import Preprocess
from lvm.interop import tensors as interop
from lvm.interop.tensors import LazyTensor
from lvm.interop.torch_reader import read_state_dict
from lvm.model.nnx_utils import Params
from lvm.training.checkpoint import Checkpoints, load_params
from lvm.training.workdir import CONFIG, RECORD_VERSION, read_record
from tokenizer import layouts
from tokenizer.layout_fields import from_variant_fields, nearest_variant, variant_of
from tokenizer.layouts import Layout
from tokenizer.network import VQGANConfig

KINDS = ("orbax", "torch", "diffusers", "maskgit")
PREPROCESS = "preprocess.json"
_MODES = {"maskgit": "center_crop", "lvm_old": "squash", "lvm": "squash"}  # preprocessing of the networks' authors
_FILENAMES = {
    "torch": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "maskgit": "tokenizer.msgpack",
}
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", "")
_LAYOUT_OF_CLASS = {
    "VQGANModel": ("lvm", "torch"), "MaskGitVQGAN": ("maskgit", "torch"), "VQModel": ("lvm", "diffusers")
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weights:
    """A stored tokenizer."""

    config: VQGANConfig
    preprocess: Preprocess  # maps images to the network's input size
    params: Params  # float32
    step: int = 0  # training step; 0 if unknown


def read(folder: epath.PathLike) -> Weights:
    """Reads a folder of any kind, or a weights file with a config.json beside it.

    Raises:
      UserError: not such a folder, an unsupported network, tensors of another network, or one that isn't finite.
    """
    weights = _read(epath.Path(folder))
    for name, leaf in flatten_dict(weights.params, sep=".").items():
        interop.check_finite(np.asarray(leaf), f"{folder}: {name}")
    return weights


def _read(path: epath.Path) -> Weights:
    if path.is_file():
        return _read_published(path.parent, path)
    if not path.exists():
        raise UserError(f"{path}: doesn't exist; expected a workdir of tokenizer training, or published weights")
    if path.is_dir() and "kind" not in _read_fields(path):
        return _read_published(path, None)
    record = read_record(path, "tokenizer", ("config", "preprocess"))
    model = dict(record["config"]["model"])
    if "l2_normalize" in model:  # by releases before there were quantizers of several kinds
        model["quantizer"] = {"kind": "l2_vq" if model.pop("l2_normalize") else "vq"}
    config = from_config_dict(VQGANConfig, model, f"{path / CONFIG}: config.model")
    preprocess = Preprocess.from_json(record["preprocess"])
    return Weights(config, preprocess, *load_params(path, layouts.param_shapes(config)))


def write(folder: epath.PathLike, weights: Weights, kind: str) -> None:
    """Writes a new folder of one of `KINDS`, atomically.

    Raises:
      UserError: the folder exists and is not empty, or the layout cannot express the network.
    """
    layout = None if kind == "orbax" else _layout_for(weights.config, kind)
    with files.new_folder(folder) as temporary:
        if layout:
            _write_published(temporary, weights, layout)
        else:
            _write_workdir(temporary, weights)


def to_layout(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
    """The tensors with the layout's names and axes."""
    params = flatten_dict(weights.params)
    return {
        name: np.ascontiguousarray(np.asarray(params[path]).transpose(layout.axes(len(shape))))
        for name, (path, shape) in layout.tensors(weights.config).items()
    }


# --- Reading published layouts ------------------------------------------------------------------------------------


def _read_published(folder: epath.Path, file: epath.Path | None) -> Weights:
    fields, where = _read_fields(folder), os.fspath(folder / CONFIG)
    file = file or _weights_file(folder)
    file_format = _file_format(file)
    layout = _layout_of(fields, file_format, where)
    preprocess, path = None, folder / PREPROCESS
    if path.exists():
        try:
            preprocess = Preprocess.from_json(files.read_json(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if layout.kind == "diffusers":  # whose sample_size is often left at its default
            fields = {**fields, "sample_size": preprocess.resolution}
    config = layout.from_fields(fields, where)
    preprocess = preprocess or Preprocess(config.resolution, _MODES[layout.variant], icc="ignore")
    if preprocess.resolution != config.resolution:
        raise UserError(f"{path}: resolution: {preprocess.resolution}, {CONFIG} says {config.resolution}")
    names, tensors = layout.tensors(config), interop.unwrap(_open(file, file_format), layout.codebook, file)
    interop.check_shapes(tensors, {name: shape for name, (_, shape) in names.items()}, file)
    _check_dtypes(tensors, file)
    params = {}
    for name, (path, shape) in names.items():
        array = tensors[name].read().transpose(np.argsort(layout.axes(len(shape))))
        params[path] = jnp.asarray(np.ascontiguousarray(array, np.float32))
    return Weights(config, preprocess, unflatten_dict(params))


def _check_dtypes(tensors: Mapping[str, LazyTensor], file: epath.Path) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()} - {np.dtype(np.float32)}
    if unsupported := dtypes - {np.dtype(np.float16), interop.BFLOAT16}:
        names = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype in unsupported]
        raise UserError(f"{file}: {'; '.join(names[:8])}; expected float32, float16 or bfloat16")
    for dtype in sorted(map(str, dtypes)):
        log_warning(f"{file}: tensors in {dtype} are widened to float32")


def _layout_of(fields: Mapping[str, Any], file_format: str, where: str) -> Layout:
    if "variant" in fields:
        layout = layouts.find_layout(fields["variant"], "maskgit" if file_format == "msgpack" else "torch")
        if layout is None:
            raise UserError(
                f"{where}: variant: {fields['variant']!r} beside a {file_format} file; expected one of "
                f"{', '.join(_MODES)}, of which only maskgit is published as msgpack"
            )
        return dataclasses.replace(layout, from_fields=from_variant_fields)
    layout = layouts.find_layout(*_LAYOUT_OF_CLASS.get(fields.get("_class_name", ""), ("", "")))
    if layout is None:
        raise UserError(
            f"{where}: not a tokenizer's: it has {', '.join(sorted(fields)) or 'nothing'}; expected kind (a workdir), "
            f"_class_name of {' or '.join(_LAYOUT_OF_CLASS)}, or variant (docs/interop.md)"
        )
    return layout


def _read_fields(folder: epath.Path) -> Mapping[str, Any]:
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
    """The only weights file of a folder; safetensors if there are the same weights in torch's format."""
    paths = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _SUFFIXES and f.name[0] != ".")
    paths = [path for path in paths if path.name not in ("LICENSE", "README")]
    paths = [path for path in paths if path.suffix == ".safetensors"] or paths
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"{folder}: weights files: {names}; expected one (or give its path), of {' '.join(_SUFFIXES)}")
    return paths[0]


def _file_format(file: epath.Path) -> str:
    """The format of a weights file, from its first bytes."""
    with open(file, "rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":  # the header follows eight bytes of its length
        return "safetensors"
    is_legacy_torch = start[:4] == b"\x80\x02\x8a\x0a"  # torch.save before it wrote zip files
    return "torch" if is_legacy_torch or zipfile.is_zipfile(file) else "msgpack"


def read_tensors(file: epath.Path) -> dict[str, LazyTensor]:
    """The tensors of a weights file of any format, by name.

    Raises:
      UserError: not such a file.
    """
    return _open(file, _file_format(file))


def _open(file: epath.Path, file_format: str) -> dict[str, LazyTensor]:
    if file_format == "torch":
        return read_state_dict(file)
    if file_format == "safetensors":
        return interop.read_safetensors(file)
    try:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack raises many types
        raise UserError(f"{file}: not weights in msgpack, safetensors or torch's format: {error}") from error
    tree = tree.get("params", tree) if isinstance(tree, dict) else {}
    leaves = flatten_dict(tree) if isinstance(tree, dict) else {}
    arrays = {".".join(map(str, path)): leaf for path, leaf in leaves.items()}
    others = [name for name, leaf in arrays.items() if not isinstance(leaf, np.ndarray)]
    if others or not arrays:
        raise UserError(f"{file}: {', '.join(others[:8]) or 'nothing'}: expected a tree of arrays")
    return {name: interop.from_array(array) for name, array in arrays.items()}


# --- Writing ------------------------------------------------------------------------------------------------------


def _layout_for(config: VQGANConfig, kind: str) -> Layout:
    variant = variant_of(config)
    layout = layouts.find_layout(variant, kind)
    if layout is None:
        kinds = ", ".join(["orbax", *layouts.layout_kinds(variant)])
        network = f"variant {variant}" if variant else f"an unpublished network ({nearest_variant(config)})"
        raise UserError(f"{network} has no layout {kind!r}; it can be written as {kinds}")
    cannot = f"the {kind} layout of {variant} cannot express this network: "
    try:
        read_back = layout.from_fields(files.as_json(layout.to_fields(config)), "read as").describe()
    except UserError as error:
        raise UserError(f"{cannot}{error}") from error
    lost = [f"{k}: {v!r} would be read as {read_back[k]!r}" for k, v in config.describe().items() if read_back[k] != v]
    if lost:
        raise UserError(f"{cannot}{'; '.join(lost)}")
    return layout


def _write_published(folder: pathlib.Path, weights: Weights, layout: Layout) -> None:
    tensors, file = to_layout(weights, layout), folder / _FILENAMES[layout.kind]
    if layout.kind == "maskgit":
        tree = {"params": unflatten_dict(tensors, sep=".")}
        files.write_atomically(file, flax.serialization.msgpack_serialize(tree))
    else:
        interop.write_safetensors(file, tensors)
    files.write_json(folder / CONFIG, layout.to_fields(weights.config))
    files.write_json(folder / PREPROCESS, weights.preprocess.to_export())


def _write_workdir(folder: pathlib.Path, weights: Weights) -> None:
    record = {
        "version": RECORD_VERSION,
        "lvm_version": __version__,
        "kind": "tokenizer",
        "config": {"model": to_json(weights.config)},
        "preprocess": weights.preprocess.to_json(),
        "converted": True,  # no training state: a new run starts from these weights
    }
    checkpoints = Checkpoints(folder)
    state = {"params": weights.params, "training": {"step": np.int32(weights.step)}}
    checkpoints.save(state, weights.step, {"converted": True})
    checkpoints.close()
    files.write_json(folder / CONFIG, record)
