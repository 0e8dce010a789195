"""Reads what `torch.save` wrote, without torch and without unpickling.

A pickle is a program that may call anything. Here its opcodes are run by a machine that calls nothing: it knows
tensors, plain containers and scalars, and refuses whatever else a file names, before anything happened.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.interop.tensors import BFLOAT16, LazyTensor

_STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": BFLOAT16,
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ADMITTED = {_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_SCALARS = (str, int, float, bool, type(None))
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSHED = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME", "STOP"}


def read_torch(path: str | os.PathLike[str]) -> Any:
    """The object in a file of `torch.save`: dicts, lists, tuples and scalars, with a `LazyTensor` for each tensor.

    The file is mapped, not read; a tensor's numbers are copied out of it when its `read` is called.

    Raises:
      UserError: not a file of `torch.save`'s zip format, a damaged one, or one that names anything but tensors and
        plain containers.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a zip file, as torch.save has written since torch 1.6; load it with torch there and save "
            "it again: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        archive = _Archive(path)
        return _Machine(archive).run(archive.pickle)
    except (zipfile.BadZipFile, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a file of `torch.save` by name: a dict of tensors, or one in a dict under `state_dict`.

    Raises:
      UserError: as `read_torch`, or the file holds something else.
    """
    found = read_torch(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}; expected a dict of tensors")
    others = [str(name) for name, value in found.items() if not isinstance(value, LazyTensor)]
    if others:
        raise UserError(f"{path}: {', '.join(others[:8])}: no tensors; expected a dict of tensors by name")
    return found


class _Archive:
    """A zip file of `torch.save`, mapped: `data.pkl`, and the bytes of each storage under `data/KEY`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(path) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip file without a data.pkl; expected what torch.save writes")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in self._entries and bytes(self._part(order)) != b"little":
            raise UserError(
                f"{path}: byte order {bytes(self._part(order))!r}; only little-endian files are read"
            )

    @property
    def pickle(self) -> bytes:
        return bytes(self._part(self._root + "data.pkl"))

    def storage(self, key: str, dtype: np.dtype) -> np.ndarray:
        """The numbers of a storage, a read-only view of the file: [n]."""
        part = self._part(f"{self._root}data/{key}")
        return np.frombuffer(part, dtype) if len(part) else np.zeros(0, dtype)

    def release(self) -> None:
        """What was read of the mapped file no longer counts as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    def _part(self, name: str) -> memoryview:
        if name not in self._entries:
            raise UserError(f"{self.path}: damaged: {name} is missing")
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{self.path}: {name} is compressed; torch.save doesn't, so save it with torch again"
            )
        # The local header's own lengths count: the central one's extra field may differ from it.
        name_length, extra_length = struct.unpack_from("<HH", self._bytes, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_length + extra_length
        part = memoryview(self._bytes)[start : start + entry.file_size]
        if len(part) != entry.file_size:
            raise UserError(f"{self.path}: damaged: {name} ends after {len(part)} of {entry.file_size} bytes")
        return part


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle would import: a name and nothing more."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    size: int


_MARK = object()


class _Machine:
    """Runs a pickle's opcodes on a stack. A call is looked up among the few that are admitted; none is made."""

    def __init__(self, archive: _Archive):
        self._archive, self._path = archive, archive.path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        operations: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._push(_MARK),
            "POP": lambda: self._stack.pop() and None,
            "EMPTY_DICT": lambda: self._push({}),
            "EMPTY_LIST": lambda: self._push([]),
            "TUPLE": lambda: self._push(tuple(self._since_mark())),
            "LIST": lambda: self._push(self._since_mark()),
            "DICT": lambda: self._push(self._filled({}, self._since_mark())),
            "APPEND": lambda: self._append([self._stack.pop()]),
            "APPENDS": lambda: self._append(self._since_mark()),
            "SETITEM": lambda: self._set(self._last(2)),
            "SETITEMS": lambda: self._set(self._since_mark()),
            "STACK_GLOBAL": lambda: self._push(self._named(" ".join(map(str, self._last(2))))),
            "BINPERSID": lambda: self._push(self._storage(self._stack.pop())),
            "REDUCE": lambda: self._push(self._made(*self._last(2))),
            "BUILD": lambda: self._build(self._stack.pop()),
            "MEMOIZE": lambda: self._memo.update({len(self._memo): self._stack[-1]}),
        }
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            name = opcode.name
            if name in _PUSHED:
                self._push(argument)
            elif name in _VALUES:
                self._push(_VALUES[name])
            elif name in _TUPLES:
                self._push(tuple(self._last(_TUPLES[name])))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[int(str(argument))] = self._stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._push(self._memo[int(str(argument))])
            elif name == "GLOBAL":
                self._push(self._named(str(argument)))
            elif name in operations:
                operations[name]()
            elif name not in _IGNORED:
                raise self._refused(f"the pickle opcode {name}")
        (result,) = self._stack
        return result

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _last(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise ValueError("the pickle takes more from its stack than there is")
        start = len(self._stack) - count
        last, self._stack = self._stack[start:], self._stack[:start]
        return last

    def _since_mark(self) -> list[Any]:
        marks = [i for i, value in enumerate(self._stack) if value is _MARK]
        since = self._last(len(self._stack) - marks[-1])
        return since[1:]

    def _append(self, values: list[Any]) -> None:
        self._target(list).extend(values)

    def _set(self, keys_and_values: list[Any]) -> None:
        self._filled(self._target(dict), keys_and_values)

    def _filled(self, target: dict[Any, Any], keys_and_values: list[Any]) -> dict[Any, Any]:
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            if not isinstance(key, _SCALARS):
                raise self._refused(f"a dict's key of type {type(key).__name__}")
            target[key] = value
        return target

    def _target(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise self._refused(f"items put into a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    def _named(self, name: str) -> _Name:
        if name not in _ADMITTED:
            raise self._refused(name.replace(" ", "."))
        return _Name(name)

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Name(kind), str(key), str(), int(size)) if kind in _STORAGES:
                return _Storage(_STORAGES[kind], key, size)
        raise self._refused(f"the reference {reference!r:.80}")

    def _made(self, called: Any, arguments: Any) -> Any:
        match called, arguments:
            case _Name(name), () if name == _ORDERED_DICT:
                return {}
            case _Name(name), (list(pairs),) if name == _ORDERED_DICT:
                return self._filled({}, [item for pair in pairs for item in pair])
            case _Name(name), (LazyTensor() as tensor, bool(), *_) if name == _PARAMETER:
                return tensor
            case _Name(name), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if (
                name == _TENSOR
            ):
                return self._tensor(storage, offset, shape, strides)
        what = called.name.replace(" ", ".") if isinstance(called, _Name) else type(called).__name__
        raise self._refused(f"a call of {what} with {arguments!r:.80}")

    def _build(self, state: Any) -> None:
        # A state dict carries `_metadata`, the versions of its modules, as an attribute: of no use here.
        if not (isinstance(self._stack[-1], dict) and isinstance(state, dict)):
            raise self._refused(f"a {type(self._stack[-1]).__name__} with a state")

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> LazyTensor:
        numbers = self._archive.storage(storage.key, storage.dtype)
        whole = all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if not whole or len(numbers) != storage.size or (0 not in shape and last >= len(numbers)):
            raise ValueError(
                f"a tensor {list(shape)} with strides {list(strides)} at {offset} of {len(numbers)} numbers"
            )

        def read() -> np.ndarray:
            steps = [stride * storage.dtype.itemsize for stride in strides]
            array = np.array(np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps), order="C")
            self._archive.release()
            return array

        return LazyTensor(shape, storage.dtype, read)

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"{self._path}: refused, since it holds more than tensors in dicts, lists and tuples: {what}; nothing of "
            "it was run"
        )
