"""Tensors in a file: named, with shape and dtype, their numbers read when they are asked for.

A checkpoint is converted tensor by tensor: no two copies of it are ever in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lvm.common import files
from lvm.common.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_LISTED = 8  # names of each kind in an error
_SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file that stays where it is until `read` is called.

    Attributes:
      shape: as the file says.
      dtype: as the file says.
      read: the numbers, a new array in C order of this shape and dtype.
      slices: what it is a stack of, where it is one.
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


def from_array(array: np.ndarray) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(array.shape, array.dtype, lambda: np.array(array, order="C"))


def cast(tensor: LazyTensor, dtype: np.dtype, name: str) -> LazyTensor:
    """The tensor in another floating-point type.

    Raises:
      UserError: when it is read, if a number is beyond that type.
    """

    def read() -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):
            made = array.astype(dtype)
        if not np.all(np.isfinite(made) | ~np.isfinite(array)):
            raise UserError(f"{name}: holds numbers up to {np.abs(array).max():.3g}, beyond {dtype}")
        return made

    return tensor if tensor.dtype == dtype else LazyTensor(tensor.shape, dtype, read)


def stack(tensors: Sequence[LazyTensor], name: str) -> LazyTensor:
    """Tensors of one shape and dtype as one, [len(tensors), ...], read one after the other.

    Raises:
      UserError: their dtypes differ.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise UserError(
            f"{name}: its layers are stored in {', '.join(sorted(map(str, dtypes)))}; convert to one --dtype"
        )
    first = tensors[0]

    def read() -> np.ndarray:
        whole = np.empty((len(tensors), *first.shape), first.dtype)
        for part, tensor in zip(whole, tensors, strict=True):
            part[...] = tensor.read()
        return whole

    return LazyTensor((len(tensors), *first.shape), first.dtype, read, tuple(tensors))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
      UserError: not such a file, or a tensor of a dtype that numpy has no name for.
    """
    import safetensors  # where there is no such file, nothing needs it

    try:
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read: {error}") from error
    tensors = {}
    for name, part in slices.items():
        if part.get_dtype() not in _SAFETENSORS:
            known = ", ".join(_SAFETENSORS)
            raise UserError(f"{path}: {name} has the dtype {part.get_dtype()}; expected one of {known}")
        dtype = _SAFETENSORS[part.get_dtype()]
        tensors[name] = LazyTensor(tuple(part.get_shape()), dtype, functools.partial(_read_one, path, name))
    return tensors


def _read_one(path: str | os.PathLike[str], name: str) -> np.ndarray:
    import safetensors

    # Opened anew, since what is read of a mapped file counts as this process's memory until it is closed.
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
        return file.get_tensor(name)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, flushed; arrays in C order. As torch's libraries expect, marked as theirs."""
    import safetensors.numpy

    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    files.flush(path)


def check_shapes(tensors: Tensors, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """That `tensors` are those of `shapes`, no more and no less.

    Raises:
      UserError: lists the missing, the unexpected and the wrongly shaped ones.
    """
    missing = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in tensors]
    unexpected = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in shapes]
    wrong = [
        f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    problems = [f"{len(names)} {kind} ({_list(names)})" for kind, names in found.items() if names]
    if problems:
        raise UserError(f"{where}: not the tensors of this network: {'; '.join(problems)}")


def _list(names: list[Any]) -> str:
    more = len(names) - _LISTED
    return "; ".join(names[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
