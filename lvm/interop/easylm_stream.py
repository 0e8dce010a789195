"""EasyLM's streaming checkpoints: msgpack objects `[key, bytes]` one after the other, the bytes flax's of an array.

A file is indexed by the heads of its objects, and an array's numbers are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

import flax.serialization
import msgpack
import numpy as np

from lvm.common import files
from lvm.common.errors import UserError
from lvm.interop.tensors import BFLOAT16, LazyTensor

Key = tuple[str, ...]
_HEAD = 2**16  # bytes that hold any key, and what comes before an array's numbers
_CHUNKED = "__msgpack_chunked_array__"  # how flax writes arrays of more than 1 GiB
# First byte → format of the length that follows, and bytes between it and the content.
_BIN = {0xC4: (">B", 0), 0xC5: (">H", 0), 0xC6: (">I", 0)}
_EXT = {0xC7: (">B", 1), 0xC8: (">H", 1), 0xC9: (">I", 1)}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class _DamagedError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class _Span:
    start: int
    size: int


def read_stream(path: str | os.PathLike[str]) -> dict[Key, LazyTensor | None]:
    """Every key of a stream with its array; None for what isn't one.

    Raises:
      UserError: not such a file, or one that ends too early.
    """
    found: dict[Key, LazyTensor | None] = {}
    size, at, last = os.path.getsize(path), 0, "its first object"
    with open(path, "rb") as file:
        while at < size:
            try:
                key, value = _entry(file, at)
                last = "/".join(key)
                if value.start + value.size > size:
                    raise _DamagedError(f"ends in the middle of {last}")
                head = _array_head(_bytes(file, value.start, min(value.size, _HEAD)))
            except (_DamagedError, ValueError, KeyError, TypeError, struct.error, IndexError) as error:
                raise UserError(
                    f"{path}: not a whole streaming checkpoint: at byte {at}, {last}: {error}"
                ) from error
            except msgpack.exceptions.UnpackException as error:
                raise UserError(
                    f"{path}: not a whole streaming checkpoint: at byte {at}, after {last}: {type(error).__name__}"
                ) from error
            shape_dtype = head and (head[0], head[1])
            found[key] = shape_dtype and LazyTensor(*shape_dtype, functools.partial(_read, path, value))
            at = value.start + value.size
    if not found:
        raise UserError(f"{path}: empty; expected a streaming checkpoint")
    return found


def write_stream(path: str | os.PathLike[str], tensors: Iterable[tuple[Key, LazyTensor]]) -> None:
    """Writes a stream, one array in memory at a time."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, tensor in tensors:
            file.write(packer.pack((key, flax.serialization.to_bytes(tensor.read()))))
    files.flush(path)


def _bytes(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _entry(file: BinaryIO, at: int) -> tuple[Key, _Span]:
    """The key of the object at a byte, and where its bytes are."""
    head = _bytes(file, at, _HEAD)
    unpacker = msgpack.Unpacker()
    unpacker.feed(head)
    if unpacker.read_array_header() != 2:
        raise _DamagedError("expected [key, bytes]")
    key = unpacker.unpack()
    if not isinstance(key, list) or not key or not all(isinstance(part, str) for part in key):
        raise _DamagedError(f"a key of {type(key).__name__}, expected a list of names")
    start = unpacker.tell()
    span = _content(head[start:], _BIN)
    if span is None:
        raise _DamagedError(f"{'/'.join(key)} holds no bytes")
    return tuple(key), _Span(at + start + span.start, span.size)


def _content(head: bytes, kinds: dict[int, tuple[str, int]]) -> _Span | None:
    """Where the content of a msgpack value of these kinds is, from its first byte on; None for another kind."""
    if head[0] not in kinds:
        return None
    length, between = kinds[head[0]]
    (size,) = struct.unpack_from(length, head, 1)
    return _Span(1 + struct.calcsize(length) + between, size)


def _array_head(head: bytes) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype of flax's bytes of an array, from their beginning; None for other values."""
    if head[0] & 0xF0 == 0x80:  # a map
        unpacker = msgpack.Unpacker()
        unpacker.feed(head)
        unpacker.read_map_header()
        if unpacker.unpack() != _CHUNKED:
            return None
        unpacker.skip()
        unpacker.skip()  # "shape"
        sizes = unpacker.unpack()
        unpacker.skip()  # "chunks"
        unpacker.read_map_header()
        unpacker.skip()  # "0"
        part = _array_head(head[unpacker.tell() :])
        return part and (tuple(sizes[str(i)] for i in range(len(sizes))), part[1])
    span = _content(head, _EXT)
    if head[0] in _FIXED_EXT:
        span = _Span(2, _FIXED_EXT[head[0]])
    if span is None or head[span.start - 1] != 1:  # flax's number for arrays
        return None
    unpacker = msgpack.Unpacker()
    unpacker.feed(head[span.start :])
    unpacker.read_array_header()
    shape, dtype = unpacker.unpack(), unpacker.unpack()
    return tuple(shape), BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _read(path: str | os.PathLike[str], span: _Span) -> np.ndarray:
    with open(path, "rb") as file:
        content: Any = flax.serialization.msgpack_restore(_bytes(file, span.start, span.size))
    return np.array(content, order="C")
