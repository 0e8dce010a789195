"""Reader of stores of version 3, for their conversion (`lvm.convert_store`): ArrayRecord shards of packed records.

A record holds one scene of several images, or a page: up to 64 scenes of one image each. Little-endian:

    "LVMS" | version u16 = 2 | scenes u16 | crc32c u32 of everything but the blocks
    frames u32 | stream set u32 | codes per image u32
    class id i32 × scenes | key length u16 × scenes | keys, UTF-8
    blocks of up to 4 grids, scene by scene, frame-major: codes u16 × (grids · N), then their crc32c u32

The index of a shard has an `_INDEX_DTYPE` a scene, then 12 bytes a record, which this reader does without.
"""

import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store.format import CHECKSUM_MISMATCH, Scene
from lvm.data.store.manifest import HEADER

VERSION = 3
_RECORDS, _INDEX, _OPTIONS = ".array_record", ".index", "readahead_buffer_size:0,max_parallelism:1"
_INDEX_DTYPE = np.dtype("<u4, <u2, u1, u1, <i4, <u8")
_INDEX_DTYPE.names = ("record", "frames", "slot", "stream_set", "class_id", "group")
_RECORD_BYTES = 12
_HEAD, _SHAPE = struct.Struct("<4sHHI"), struct.Struct("<III")
_BLOCK_SIZE, _CHECKSUM_SIZE = 4, 4  # grids, bytes


def read_header(folder: epath.Path) -> dict[str, Any]:
    """The header of a store, with its number of shards, without its version. Raises UserError if it has another."""
    if not (folder / HEADER).exists():
        raise UserError(f"{folder}: not a store ({HEADER} is missing)")
    header = files.read_json(folder / HEADER)
    if (version := header.pop("version", None)) != VERSION:
        raise UserError(f"{folder / HEADER}: version {version}, expected {VERSION}")
    return header


def read_scenes(folder: epath.Path, entry: Mapping[str, Any], header: Mapping[str, Any]) -> Iterator[Scene]:
    """Yields the scenes of a shard in the order of its index.

    Args:
      folder: of the shard's files, on local disk.
      entry: of the shard.
      header: of the store, with the names of its classes and stream sets.

    Raises:
      UserError: a file differs from the entry, or a record is corrupted or not that of the index.
    """
    for name, expected in entry["files"].items():
        if files.sha256(folder / name) != expected["sha256"]:
            raise UserError(f"{folder / name}: damaged: checksum differs from the entry's; encode the shard again")
    data = np.fromfile(folder / f"{entry['name']}{_INDEX}", np.uint8)
    index = data[: len(data) - entry["records"] * _RECORD_BYTES].view(_INDEX_DTYPE)
    path = folder / f"{entry['name']}{_RECORDS}"
    reader = array_record_module.ArrayRecordReader(os.fspath(path), _OPTIONS)
    for record in range(entry["records"]):
        rows = index[slice(*np.searchsorted(index["record"], [record, record + 1]))]
        try:
            ids, scenes = _unpack(reader.read(record, record + 1)[0], header, rows["group"].tolist())
        except (ValueError, RuntimeError, IndexError, struct.error) as error:
            raise UserError(f"{path}, record {record}: damaged: {error}; encode the shard again") from error
        indexed = [row[1:5] for row in rows.tolist()]
        if indexed != [(len(scenes[slot].codes), slot, *ids[slot]) for slot in range(len(scenes))]:
            raise UserError(f"{path}, record {record}: the index describes other scenes; encode the shard again")
        yield from scenes


def _unpack(
    record: bytes, header: Mapping[str, Any], groups: Sequence[int]
) -> tuple[list[tuple[int, int]], list[Scene]]:
    """Stream set and class ids, and the scenes, of a record. Raises ValueError if it is corrupted."""
    magic, version, count, checksum = _HEAD.unpack_from(record)
    T, stream_set, N = _SHAPE.unpack_from(record, _HEAD.size)
    if (magic, version, count) != (b"LVMS", 2, len(groups)) or stream_set >= len(header["stream_sets"]):
        raise ValueError(f"format {magic!r}, version {version}, {count} scenes of stream set {stream_set}")
    streams, classes = tuple(header["stream_sets"][stream_set]), [*header["classes"], ""]  # class -1 is the last
    S = len(streams)
    blocks_size = count * T * S * 2 * N + -(-count * T * S // _BLOCK_SIZE) * _CHECKSUM_SIZE
    metadata, blocks = record[_HEAD.size : -blocks_size], record[-blocks_size:]
    class_ids = np.frombuffer(metadata, "<i4", count, _SHAPE.size).tolist()
    lengths = np.frombuffer(metadata, "<u2", count, _SHAPE.size + 4 * count).tolist()
    keys_start = _SHAPE.size + 6 * count
    ends = np.cumsum([keys_start, *lengths]).tolist()
    head = record[: _HEAD.size - _CHECKSUM_SIZE]
    if ends[-1] != len(metadata) or google_crc32c.value(head + metadata) != checksum:
        raise ValueError(CHECKSUM_MISMATCH)
    codes = np.frombuffer(b"".join(_check_blocks(blocks, N)), "<u2").reshape(count, T, S, N)
    keys = [metadata[start:end].decode() for start, end in itertools.pairwise(ends)]
    return [(stream_set, class_id) for class_id in class_ids], [
        Scene(key, classes[class_id], streams, grids, group)
        for key, class_id, grids, group in zip(keys, class_ids, codes, groups, strict=True)
    ]


def _check_blocks(blocks: bytes, codes_per_image: int) -> Iterator[bytes]:
    """Yields the codes of each block. Raises ValueError where the checksum after them is another."""
    stride = _BLOCK_SIZE * 2 * codes_per_image + _CHECKSUM_SIZE
    for start in range(0, len(blocks), stride):
        block = blocks[start : start + stride]
        codes, checksum = block[:-_CHECKSUM_SIZE], block[-_CHECKSUM_SIZE:]
        if google_crc32c.value(codes) != int.from_bytes(checksum, "little"):
            raise ValueError(CHECKSUM_MISMATCH)
        yield codes
