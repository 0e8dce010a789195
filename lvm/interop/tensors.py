"""Lazy tensors: shape and dtype are known, data is read from the file on demand.

Checkpoints are converted tensor by tensor and never are in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_MAX_LISTED = 8
_CHUNK = 2**18  # elements whose bits are tested at once: they stay in the processor's cache
# Parts of names that torch.compile, FSDP and activation checkpointing add to whatever module they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      read: returns the data, a new array in C order of this shape and dtype.
      slices: tensors along the first axis, if it is a stack of tensors.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    slices: Sequence[LazyTensor] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


Tensors = Mapping[str, LazyTensor]


def from_array(array: Shaped[np.ndarray, "..."]) -> LazyTensor:
    """Wraps an array in memory."""
    return LazyTensor(array.shape, array.dtype, lambda: np.array(array, order="C"))


def check_finite(array: Shaped[np.ndarray, "..."], name: str) -> None:
    """Raises UserError if a float array in C order has a NaN or an infinity: whose exponent's bits are all set."""
    bits = array.reshape(-1).view(f"u{array.itemsize}")  # NumPy tests bfloat16 itself three times slower
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    chunks = (bits[start : start + _CHUNK] for start in range(0, bits.size, _CHUNK))
    if count := sum(int(np.count_nonzero(chunk & exponent == exponent)) for chunk in chunks):
        raise UserError(f"{name}: {count} of {array.size} values are NaN or infinite; use intact weights")


def checked(tensor: LazyTensor, name: str) -> LazyTensor:
    """The tensor, with `check_finite` when it is read."""

    def read() -> np.ndarray:
        array = tensor.read()
        check_finite(array, name)
        return array

    return dataclasses.replace(tensor, read=read)


def cast(tensor: LazyTensor, dtype: np.dtype, name: str) -> LazyTensor:
    """Casts a tensor to another float dtype when it is read. Reading raises UserError if a finite value overflows."""

    def read() -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if not np.all(np.isfinite(result) | ~np.isfinite(array)):
            raise UserError(f"{name}: values up to {np.abs(array).max():.3g} overflow {dtype}")
        return result

    return tensor if tensor.dtype == dtype else LazyTensor(tensor.shape, dtype, read)


def stack(tensors: Sequence[LazyTensor], name: str) -> LazyTensor:
    """Stacks tensors of one shape along a new first axis, read one by one. Raises UserError for unequal dtypes."""
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if len(dtypes) > 1:
        raise UserError(f"{name}: layers have different dtypes ({', '.join(dtypes)}); convert to one with --dtype")
    first = tensors[0]
    shape = (len(tensors), *first.shape)

    def read() -> np.ndarray:
        stacked = np.empty(shape, first.dtype)
        for row, tensor in zip(stacked, tensors, strict=True):
            row[...] = tensor.read()
        return stacked

    return LazyTensor(shape, first.dtype, read, tuple(tensors))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens the tensors of a safetensors file by name. Raises UserError for another file or an unknown dtype."""
    try:
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error
    tensors = {}
    for name, entry in slices.items():
        dtype = _SAFETENSORS_DTYPES.get(entry.get_dtype())
        if dtype is None:
            supported = ", ".join(_SAFETENSORS_DTYPES)
            raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}; supported are {supported}")
        tensors[name] = LazyTensor(tuple(entry.get_shape()), dtype, functools.partial(_read_tensor, path, name))
    return tensors


def _read_tensor(path: str | os.PathLike[str], name: str) -> np.ndarray:
    # Opened anew each time: pages of a mapping count as this process's memory until it is closed.
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
        return file.get_tensor(name)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file of arrays in C order and flushes it to disk."""
    path.touch()
    mode = path.stat().st_mode
    # transformers 4 refuses files without this metadata.
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors leaves the mode of a private temporary file, 0600, where others have the umask's
    files.flush(path)


def unwrap(tensors: Tensors, anchor: str, path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a file by their names in the module itself: without wrappers' parts, nor a prefix that all share.

    `anchor` is the name of one of them in the module; prefixes are, for example, `module.` or `vqgan.`.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    prefix = next((name.removesuffix(anchor) for name in names.values() if name.endswith(f".{anchor}")), "")
    if anchor not in names.values() and all(name.startswith(prefix) for name in names.values()):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    if changed := [f"{name} as {short}" for name, short in names.items() if name != short]:
        log_info(f"{path}: {len(changed)} names are read without their wrapper's prefix: {changed[0]}")
    return {short: tensors[name] for name, short in names.items()}


def check_shapes(tensors: Tensors, shapes: Mapping[str, Sequence[int]], path: str | os.PathLike[str]) -> None:
    """Raises UserError, listing the differences, unless the tensors have exactly these names and shapes."""
    problems = {
        "missing": [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in tensors],
        "unexpected": [f"{name} {list(t.shape)}" for name, t in tensors.items() if name not in shapes],
        "of another shape": [
            f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ],
    }
    listed = [f"{len(names)} {kind} ({format_names(names)})" for kind, names in problems.items() if names]
    if listed:
        raise UserError(f"{path}: not the tensors of this network: {'; '.join(listed)}")


def format_names(names: Sequence[str]) -> str:
    """The first names, and the number of those left out: `a; b; and 3 more`."""
    more = len(names) - _MAX_LISTED
    return "; ".join(names[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
