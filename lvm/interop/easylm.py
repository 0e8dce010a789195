"""EasyLM's and LVM's checkpoints: a streaming checkpoint, and a config.json beside it.

A stream is consecutive msgpack objects `[key, bytes]`, the bytes an array in flax's encoding. Only the headers of
objects and arrays are read to index a file; array data is read on demand.
"""

import functools
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import flax.serialization
import msgpack
import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.interop.config_fields import EASYLM_CONTEXT, LLAMA_CONTEXT, common_fields, read_checkpoint, write_record
from lvm.interop.layouts import EASYLM
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.interop.tensors import BFLOAT16, LazyTensor, format_names
from lvm.training.workdir import CONFIG

PARAMS = "streaming_params"
_PREFIXES = ("streaming_params", "streaming_train_state")
_SUFFIXES = (".msgpack", ".easylm", ".stream")
Key = tuple[str, ...]
_MAX_HEADER = 2**16  # bytes; longer than any key, and than whatever precedes the data of an array
_CHUNKED = "__msgpack_chunked_array__"  # flax splits arrays of more than 1 GiB
_NDARRAY = 1  # flax's extension type
# First byte of a msgpack value → format of the length of a byte string, or the bytes before an extension's content.
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_EXTENSIONS = {0xC7: 3, 0xC8: 4, 0xC9: 6, 0xD4: 2, 0xD5: 2, 0xD6: 2, 0xD7: 2, 0xD8: 2}


def list_streams(names: Sequence[str]) -> list[str]:
    """The streaming checkpoints among file names, sorted."""
    return sorted(name for name in names if name.startswith(_PREFIXES) or name.endswith(_SUFFIXES))


def read(file: epath.Path) -> LazyCheckpoint:
    """Opens a streaming checkpoint, `streaming_params` or `streaming_train_state` under any name.

    Raises UserError without a config.json beside it, and for an unsupported network, a truncated stream, tensors that
    are not the network's, or an unknown vocabulary.
    """
    path = file.parent / CONFIG
    if not path.exists():
        raise UserError(f"{path}: not found; a stream has no model sizes, so it needs one (docs/interop.md)")
    fields = files.read_json(path)
    context_field = LLAMA_CONTEXT if LLAMA_CONTEXT in fields else EASYLM_CONTEXT
    return read_checkpoint(file.parent, file, fields, context_field, EASYLM, lambda _: _open_parameters(file))


def _open_parameters(file: epath.Path) -> dict[str, LazyTensor]:
    """The parameters by dotted name; of a train state, its `params` alone."""
    entries = read_stream(file)
    if any(key[:2] == ("params", "params") for key in entries):
        prefix: Key = ("params", "params")
    else:
        prefix = ("params",) if any(key[0] == "params" for key in entries) else ()
    parameters = {".".join(key[len(prefix) :]): value for key, value in entries.items() if key[: len(prefix)] == prefix}
    others = [name for name, value in parameters.items() if value is None]
    if others:
        raise UserError(f"{file}: not arrays: {format_names(others)}")
    return {name: value for name, value in parameters.items() if value is not None}


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes a streaming checkpoint and its config.json."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if config.kv_heads != config.num_heads:
        log_warning("EasyLM doesn't support grouped key-value heads: its own code can't load this checkpoint")
    tensors = EASYLM.export_tensors(checkpoint.tensors)
    write_stream(folder / PARAMS, ((tuple(name.split(".")), tensor) for name, tensor in tensors.items()))
    files.write_json(folder / CONFIG, common_fields(config, vocabulary, EASYLM_CONTEXT))
    write_record(folder, checkpoint)


def read_stream(path: str | os.PathLike[str]) -> dict[Key, LazyTensor | None]:
    """Indexes a stream: key → array, or None for any other value. Raises UserError for another or truncated file."""
    entries: dict[Key, LazyTensor | None] = {}
    size, offset, last = os.path.getsize(path), 0, "the beginning"
    with open(path, "rb") as file:
        while offset < size:
            try:
                key, start, length = _read_entry(file, offset)
                if start + length > size:
                    raise ValueError(f"{'/'.join(key)} is truncated")
                header = _parse_array(_read_bytes(file, start, min(length, _MAX_HEADER)))
            except (ValueError, LookupError, TypeError, struct.error, msgpack.exceptions.UnpackException) as error:
                reason = str(error) or type(error).__name__
                raise UserError(
                    f"{path}: not a complete streaming checkpoint: at byte {offset}, after {last}: {reason}"
                ) from error
            entries[key] = header and LazyTensor(*header, functools.partial(_read_array, path, start, length))
            offset, last = start + length, "/".join(key)
    if not entries:
        raise UserError(f"{path}: empty; expected a streaming checkpoint")
    return entries


def write_stream(path: str | os.PathLike[str], tensors: Iterable[tuple[Key, LazyTensor]]) -> None:
    """Writes a streaming checkpoint, with one array in memory at a time."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, tensor in tensors:
            file.write(packer.pack((key, flax.serialization.to_bytes(tensor.read()))))
    files.flush(path)


def _read_bytes(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _read_entry(file: BinaryIO, offset: int) -> tuple[Key, int, int]:
    """The key of the object at `offset`, and the start and length of its bytes."""
    header = _read_bytes(file, offset, _MAX_HEADER)
    unpacker = msgpack.Unpacker()
    unpacker.feed(header)
    if unpacker.read_array_header() != 2:
        raise ValueError("expected [key, bytes]")
    key = unpacker.unpack()
    if not isinstance(key, list) or not key or not all(isinstance(name, str) for name in key):
        raise ValueError(f"key is a {type(key).__name__}, expected a list of names")
    start = unpacker.tell()
    if header[start] not in _BYTES:
        raise ValueError(f"{'/'.join(key)} has no bytes")
    length_format = _BYTES[header[start]]
    (length,) = struct.unpack_from(length_format, header, start + 1)
    return tuple(key), offset + start + 1 + struct.calcsize(length_format), length


def _parse_array(header: bytes) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype from the first bytes of a value in flax's encoding; None if it is no array."""
    unpacker = msgpack.Unpacker()
    if header[0] & 0xF0 == 0x80:  # a map: {_CHUNKED: True, "shape": {"0": …}, "chunks": {"0": array, …}}
        unpacker.feed(header)
        unpacker.read_map_header()
        if unpacker.unpack() != _CHUNKED:
            return None
        unpacker.skip()
        unpacker.skip()
        sizes = unpacker.unpack()
        unpacker.skip()
        unpacker.read_map_header()
        unpacker.skip()
        chunk = _parse_array(header[unpacker.tell() :])
        return chunk and (tuple(sizes[str(i)] for i in range(len(sizes))), chunk[1])
    start = _EXTENSIONS.get(header[0])
    if start is None or header[start - 1] != _NDARRAY:
        return None
    unpacker.feed(header[start:])
    unpacker.read_array_header()
    shape, dtype = unpacker.unpack(), unpacker.unpack()
    return tuple(shape), BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _read_array(path: str | os.PathLike[str], start: int, length: int) -> np.ndarray:
    with open(path, "rb") as file:
        return np.array(flax.serialization.msgpack_restore(_read_bytes(file, start, length)), order="C")
