"""Record format of scenes (version 2).

A record holds one scene of several images, or a page: up to 64 single-image scenes of one stream set. Little-endian:

    magic "LVMS" | version u16 | scenes u16 | crc32c u32 of everything but the blocks
    frames u32 | stream set u32 | codes per image u32
    class id i32 × scenes | key length u16 × scenes | keys, UTF-8
    blocks of up to 4 grids, scene by scene, frame-major: codes u16 × (grids · N), then their crc32c u32

Each block has its own checksum: reading one image of a page, or some frames of a long video, touches only the blocks
that hold them.
"""

import dataclasses
import struct
from collections.abc import Sequence
from typing import TypeVar

import google_crc32c
import numpy as np
from jaxtyping import Int, UInt16

from lvm.common.errors import UserError

MAGIC, VERSION = b"LVMS", 2
PAGE_SIZE = 64  # single-image scenes per record
BLOCK_SIZE = 4  # grids per checksum: 2 KiB of 256 codes each, half of a disk's 4 KiB block
_CHECKSUM_SIZE = 4  # bytes
# CRC of any bytes followed by their own CRC: a constant, so a block is checked in one pass.
_RESIDUE = google_crc32c.value(b"x" + google_crc32c.value(b"x").to_bytes(4, "little"))
_MAX_U16 = 2**16 - 1  # frames of a scene, bytes of a key
_HEAD = struct.Struct("<4sHHI")
_SHAPE = struct.Struct("<III")
RECORD_HEADER_SIZE = _HEAD.size + _SHAPE.size

# The index file of a shard: a `SCENE_DTYPE` per scene,
SCENE_DTYPE = np.dtype("<u4, <u2, u1, u1, <i4, <u8")
SCENE_DTYPE.names = ("record", "frames", "slot", "stream_set", "class_id", "group")
# then a `RECORD_DTYPE` per record: offset of its blocks in the shard (`records.read_ranges`) and their number of grids.
RECORD_DTYPE = np.dtype([("start", "<i8"), ("grids", "<i4")])
# Both for one scene, and its shard.
ENTRY_DTYPE = np.dtype([*SCENE_DTYPE.descr, *RECORD_DTYPE.descr, ("shard", "<i4")])
CHECKSUM_MISMATCH = "checksum mismatch"

Size = TypeVar("Size", int, np.ndarray)


class DamagedError(UserError):
    """A corrupted record. Outside this module, the message begins with the shard and the record."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """T frames × S streams of grids of N codes.

    Attributes:
      key: unique in its store.
      class_id: index into the store's classes, -1 for none.
      stream_set: index into the store's stream sets.
      codes: frame-major.
    """

    key: str
    class_id: int
    stream_set: int
    codes: UInt16[np.ndarray, "T S N"]


def pack(scenes: Sequence[Scene]) -> bytes:
    """Serializes one scene, or a page of single-image scenes of one stream set, as a record.

    Raises:
      UserError: more frames, or a longer key, than 16 bits can count.
    """
    first = scenes[0]
    T, S, N = first.codes.shape
    if len(scenes) > 1 and (T * S > 1 or len(scenes) > PAGE_SIZE):
        raise ValueError(f"a page holds up to {PAGE_SIZE} scenes of one image, not {len(scenes)} of {T}×{S}")
    if any(scene.codes.shape != (T, S, N) or scene.stream_set != first.stream_set for scene in scenes):
        raise ValueError("the scenes of a page must agree in shape and stream set")
    keys = [scene.key.encode() for scene in scenes]
    key_size = max(map(len, keys))
    if max(T, key_size) > _MAX_U16:
        raise UserError(f"{first.key[:80]}: {T} frames, key of {key_size} bytes; the limit of both is {_MAX_U16}")
    head = _HEAD.pack(MAGIC, VERSION, len(scenes), 0)
    class_ids = np.array([scene.class_id for scene in scenes], "<i4").tobytes()
    lengths = np.array([len(key) for key in keys], "<u2").tobytes()
    metadata = b"".join([_SHAPE.pack(T, first.stream_set, N), class_ids, lengths, *keys])
    checksum = _metadata_checksum(head, metadata)
    grids = np.concatenate([scene.codes for scene in scenes]).astype("<u2").reshape(-1, N)
    blocks = [grids[start : start + BLOCK_SIZE].tobytes() for start in range(0, len(grids), BLOCK_SIZE)]
    checked = [block + google_crc32c.value(block).to_bytes(_CHECKSUM_SIZE, "little") for block in blocks]
    return _HEAD.pack(MAGIC, VERSION, len(scenes), checksum) + metadata + b"".join(checked)


def blocks_size(num_grids: Size, codes_per_image: int) -> Size:
    """Bytes of a record's blocks, checksums included: the last part of the record. Elementwise for arrays."""
    return num_grids * 2 * codes_per_image + -(-num_grids // BLOCK_SIZE) * _CHECKSUM_SIZE


def _metadata_checksum(head: bytes, metadata: bytes) -> int:
    """CRC of everything but the blocks and the checksum itself."""
    return google_crc32c.extend(google_crc32c.value(head[: _HEAD.size - _CHECKSUM_SIZE]), metadata)


def unpack(record: bytes, num_streams: Sequence[int]) -> list[Scene]:
    """Parses a record that `pack` made.

    Args:
      record: all of its bytes.
      num_streams: number of streams of each stream set.

    Raises:
      DamagedError: not a record of this version, or corrupted.
    """
    if len(record) < RECORD_HEADER_SIZE:
        raise DamagedError(f"{len(record)} bytes; a record's header has {RECORD_HEADER_SIZE}")
    magic, version, count, checksum = _HEAD.unpack_from(record)
    if (magic, version) != (MAGIC, VERSION):
        raise DamagedError(f"format is {magic!r} version {version}, not {MAGIC!r} version {VERSION}")
    T, stream_set, N = _SHAPE.unpack_from(record, _HEAD.size)
    num_grids = count * T * num_streams[stream_set] if stream_set < len(num_streams) else 0
    blocks_start = len(record) - blocks_size(num_grids, N)
    lengths_start = RECORD_HEADER_SIZE + 4 * count
    keys_start = lengths_start + 2 * count
    has_lengths = keys_start <= blocks_start
    lengths = np.frombuffer(record, "<u2", count, lengths_start).tolist() if has_lengths else []
    if num_grids < 1 or keys_start + sum(lengths) != blocks_start:
        raise DamagedError(f"{len(record)} bytes don't hold {count} scenes of {T} frames")
    codes = unpack_blocks(record[blocks_start:], num_grids, N)
    if codes is None or _metadata_checksum(record, record[_HEAD.size : blocks_start]) != checksum:
        raise DamagedError(CHECKSUM_MISMATCH)
    class_ids = np.frombuffer(record, "<i4", count, RECORD_HEADER_SIZE).tolist()
    scene_codes = codes.reshape(count, T, num_streams[stream_set], N)
    scenes, start = [], keys_start
    for class_id, length, grids in zip(class_ids, lengths, scene_codes, strict=True):
        scenes.append(Scene(record[start : start + length].decode(), class_id, stream_set, grids))
        start += length
    return scenes


def unpack_blocks(blocks: bytes, num_grids: int, codes_per_image: int) -> UInt16[np.ndarray, "G N"] | None:
    """All grids of a record; None if a block is corrupted."""
    stride = blocks_size(BLOCK_SIZE, codes_per_image)
    checked = [blocks[start : start + stride] for start in range(0, len(blocks), stride)]
    if first_damaged_block(checked) is not None:
        return None
    codes = b"".join([block[:-_CHECKSUM_SIZE] for block in checked])
    return np.frombuffer(codes, "<u2").reshape(num_grids, codes_per_image)


def first_damaged_block(blocks: Sequence[bytes]) -> int | None:
    """Index of the first block whose checksum is wrong, None if there is none."""
    residues = list(map(google_crc32c.value, blocks))
    if residues.count(_RESIDUE) == len(residues):
        return None
    return next(i for i, residue in enumerate(residues) if residue != _RESIDUE)


def gather_grids(
    blocks: bytes, offsets: Int[np.ndarray, " n"], codes_per_image: int
) -> UInt16[np.ndarray, "n {codes_per_image}"]:
    """The grids at byte `offsets` of `blocks`."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(blocks, "<u2"), codes_per_image)
    return windows[offsets // 2]
