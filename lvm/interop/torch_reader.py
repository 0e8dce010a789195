"""Reader for files of `torch.save` that needs no torch and executes no code.

A pickle is a program that may import and call anything. `pickle.Unpickler` is restricted here as its documentation
describes: `find_class` resolves a few names to inert objects of ours, `persistent_load` admits storages alone.
"""

import dataclasses
import io
import os
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from lvm.common.errors import UserError
from lvm.interop.tensors import BFLOAT16, LazyTensor, format_names

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64), "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16), "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": np.dtype(np.int64), "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16), "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8), "torch.BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
_FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_MAX_TUPLES = 100_000
_DAMAGE = (
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, AttributeError, EOFError, LookupError, OverflowError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Loads a file of `torch.save`: dicts, lists, tuples and scalars, with a `LazyTensor` for each tensor.

    Raises UserError for files not in its zip format, damaged, or that refer to anything but tensors and containers.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a zip file, the format of torch.save since torch 1.6; load it with torch and save it again: "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        return _TensorUnpickler(path).load()
    except _RefusedError as error:
        raise UserError(
            f"{path}: refused: {error}; only tensors in dicts, lists and tuples are read, and no code is executed"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Loads a dict of tensors, the file's content or its `state_dict`. Raises UserError for any other content."""
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    others = [str(name) for name, value in content.items() if not isinstance(value, LazyTensor)]
    if others:
        raise UserError(f"{path}: not tensors: {format_names(others)}; expected a dict of tensors by name")
    return content


class _RefusedError(Exception):
    """A reference to something that is not on the allow-list."""


class _Inert:
    """Base class of what a pickle can create. BUILD, the opcode that sets attributes, is refused."""

    def __setstate__(self, state: object) -> None:
        raise _RefusedError(f"a state for {type(self).__name__}")


@dataclasses.dataclass(frozen=True)
class _Storage(_Inert):
    """`size` elements of `dtype` at byte `start` of the file."""

    path: str | os.PathLike[str]
    dtype: np.dtype
    start: int
    size: int


class _Tensor(_Inert, LazyTensor):
    """A tensor whose attributes a pickle can't set."""


class _OrderedDict(dict):
    """A `collections.OrderedDict` of the pickle."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):  # a module's state dict has `_metadata`, which is ignored
            raise _RefusedError(f"a state of type {type(state).__name__} for OrderedDict")


@dataclasses.dataclass(frozen=True)
class _Global(_Inert):
    """An allowed name; calling it builds our own equivalent of what the name means."""

    name: str

    def __call__(self, *args: Any) -> Any:
        match self.name, args:
            case "collections.OrderedDict", () | (list(),):
                return _OrderedDict(*args)
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, bool(), *_):
                return tensor
            case "torch._utils._rebuild_tensor_v2", (_Storage(), int(), tuple(), tuple(), *_):
                return _rebuild_tensor(*args[:4])
        raise _RefusedError(f"a call of {self.name} with {reprlib.repr(args)}")


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple) -> LazyTensor:
    is_valid = all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not is_valid or (0 not in shape and last >= storage.size):
        raise ValueError(f"shape {shape}, strides {strides}, offset {offset} in a storage of {storage.size}")

    def read() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        # Mapped anew each time: pages of a mapping count as this process's memory until it is closed.
        elements = np.memmap(storage.path, storage.dtype, "r", storage.start, (storage.size,))
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.array(np.lib.stride_tricks.as_strided(elements[offset:], shape, steps), order="C")

    return _Tensor(shape, storage.dtype, read)


_PythonUnpickler: Any = pickle._Unpickler  # typed as Any: the type stubs lack its methods


class _TensorUnpickler(_PythonUnpickler):
    """Unpickler of `data.pkl` in a zip file of `torch.save`, which holds the bytes of each storage in `data/KEY`.

    The Python version of the standard library's, since keys must be checked before they are hashed: hashing nested
    tuples takes exponential time or overflows the stack.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, path: str | os.PathLike[str]):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise UserError(f"{path}: a zip file without a data.pkl; expected a file of torch.save")
        self._root = roots[0]
        if self._root + "byteorder" in self._entries and (order := self._read("byteorder")) != b"little":
            raise UserError(f"{path}: byte order {order!r}; only little-endian files are supported")
        program = self._read("data.pkl")
        _check_sizes(program)
        super().__init__(io.BytesIO(program))

    def _check_keys(self, keys: Iterable[object]) -> None:
        for key in keys:
            if not isinstance(key, str | int | float | None):
                raise _RefusedError(f"a key of type {type(key).__name__}")

    def _load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _PythonUnpickler.load_setitem(self)

    def _load_setitems(self) -> None:
        self._check_keys(self.stack[::2])  # since the mark
        _PythonUnpickler.load_setitems(self)

    def _load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        _PythonUnpickler.load_dict(self)

    def _load_set(self) -> None:
        raise _RefusedError("a set")

    dispatch |= {
        pickle.SETITEM[0]: _load_setitem, pickle.SETITEMS[0]: _load_setitems, pickle.DICT[0]: _load_dict,
        pickle.EMPTY_SET[0]: _load_set, pickle.FROZENSET[0]: _load_set,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> _Global:
        if (full_name := f"{module}.{name}") not in (*_FUNCTIONS, *_STORAGES):
            raise _RefusedError(full_name)
        return _Global(full_name)

    def persistent_load(self, reference: object) -> _Storage:
        match reference:
            case ("storage", _Global(name), str(key), str(), int(size)) if name in _STORAGES:
                start, size_bytes = self._locate(f"data/{key}")
                if size_bytes != size * _STORAGES[name].itemsize:
                    raise ValueError(f"data/{key} has {size_bytes} bytes, expected {size} elements of {name}")
                return _Storage(self._path, _STORAGES[name], start, size)
        raise _RefusedError(f"the reference {reprlib.repr(reference)}")

    def _locate(self, name: str) -> tuple[int, int]:
        """The offset and size in bytes of an entry's data."""
        if self._root + name not in self._entries:
            raise ValueError(f"{name} is missing")
        entry = self._entries[self._root + name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self._path}: {name} is compressed; save it again with torch.save")
        with open(self._path, "rb") as file:
            # The local header has its own lengths: its extra field may differ from the central directory's.
            file.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        if start + entry.file_size > os.path.getsize(self._path):
            raise ValueError(f"{name} of {entry.file_size} bytes goes beyond the end of the file")
        return start, entry.file_size

    def _read(self, name: str) -> bytes:
        start, size = self._locate(name)
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(size)


def _check_sizes(program: bytes) -> None:
    """Refuses sizes beyond the pickle's own: the unpickler allocates what an argument claims before it reads."""
    num_tuples = 0
    # genops raises ValueError where an argument is longer than what is left.
    for opcode, argument, _ in pickletools.genops(program):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(program):
            raise ValueError(f"memo index {argument} in a pickle of {len(program)} bytes")
        num_tuples += opcode.name.startswith("TUPLE")
        if num_tuples > _MAX_TUPLES:
            raise ValueError(f"more than {_MAX_TUPLES} tuples")
