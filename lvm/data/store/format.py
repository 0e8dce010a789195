"""Scenes of codes, and how they lie in a record (version 2).

A record is a page: one scene of several images, or up to 64 scenes of a single image each that share their
stream. Little-endian:

    magic "LVMS" | version u16 | scenes u16 | crc32c u32 of all but the blocks
    frames u32 | stream set u32 | codes an image u32
    class id i32 × scenes | key length u16 × scenes | keys, UTF-8
    blocks of up to 4 grids, scene after scene, frame-major: codes u16 × (grids · N), and the crc32c u32 of them

A block is checked by itself: whoever wants one image of a page, or some frames of a long video, reads no more than
the blocks that hold them.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import numpy as np

from lvm.common.errors import UserError

MAGIC, VERSION = b"LVMS", 2
PAGE_SIZE = 64  # single-image scenes in one record
BLOCK_SIZE = 4  # grids that share a checksum: 2 KiB of a disk's 4
_CHECK = 4  # bytes of a checksum
# The crc32c of anything that its own crc32c follows.
_RESIDUE = google_crc32c.value(b"x" + google_crc32c.value(b"x").to_bytes(4, "little"))
_MOST = 2**16 - 1  # frames of a scene, and bytes of a key
_HEAD = struct.Struct("<4sHHI")
_SHAPE = struct.Struct("<III")
RECORD_HEADER_SIZE = _HEAD.size + _SHAPE.size

# One entry a scene, in a file beside each shard.
SCENE_DTYPE = np.dtype(
    [
        ("record", "<u4"),
        ("frames", "<u2"),
        ("slot", "u1"),
        ("stream_set", "u1"),
        ("class_id", "<i4"),
        ("group", "<u8"),
    ]
)
# Then one a record: where its blocks begin in the shard (`records.read_ranges`), and how many grids they hold.
RECORD_DTYPE = np.dtype([("start", "<i8"), ("grids", "<i4")])
# Both of a scene, and its shard.
ENTRY_DTYPE = np.dtype([*SCENE_DTYPE.descr, *RECORD_DTYPE.descr, ("shard", "<i4")])
CHECKSUM_MISMATCH = "damaged: a checksum doesn't fit the content"


Where = str | Callable[[], str]


class DamagedError(UserError):
    """A record that isn't what was written. The message begins with its shard and record."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """What belongs together: T frames × S streams of grids.

    Attributes:
      key: unique in its store.
      class_id: index into the store's classes, -1 for none.
      stream_set: index into the store's stream sets.
      codes: uint16 [T, S, N].
    """

    key: str
    class_id: int
    stream_set: int
    codes: np.ndarray


def pack(scenes: Sequence[Scene]) -> bytes:
    """The record of one scene, or of a page of single-image scenes of one stream set.

    Raises:
      UserError: more frames, or a longer key, than a record or its index can tell.
    """
    first = scenes[0]
    T, S, N = first.codes.shape
    if len(scenes) > 1 and (T * S > 1 or len(scenes) > PAGE_SIZE):
        raise ValueError(f"a page holds up to {PAGE_SIZE} scenes of one image, not {len(scenes)} of {T}×{S}")
    if any(scene.codes.shape != (T, S, N) or scene.stream_set != first.stream_set for scene in scenes):
        raise ValueError("the scenes of a page must agree in shape and stream set")
    keys = [scene.key.encode() for scene in scenes]
    if T > _MOST or max(map(len, keys)) > _MOST:
        raise UserError(
            f"{first.key[:80]}: {T} frames, and a key of {max(map(len, keys))} bytes; at most {_MOST} each"
        )
    rest = b"".join(
        [
            _SHAPE.pack(T, first.stream_set, N),
            np.array([scene.class_id for scene in scenes], "<i4").tobytes(),
            np.array([len(key) for key in keys], "<u2").tobytes(),
            *keys,
        ]
    )
    checksum = _head_checksum(_HEAD.pack(MAGIC, VERSION, len(scenes), 0), rest)
    grids = np.concatenate([scene.codes for scene in scenes]).astype("<u2").reshape(-1, N)
    return _HEAD.pack(MAGIC, VERSION, len(scenes), checksum) + rest + _in_blocks(grids)


def blocks_size(grids: Any, codes_per_image: int) -> Any:
    """Bytes of so many grids with their checksums, the last part of a record: int, or int64 [n]."""
    return grids * 2 * codes_per_image + -(-grids // BLOCK_SIZE) * _CHECK


def _in_blocks(grids: np.ndarray) -> bytes:
    parts = []
    for start in range(0, len(grids), BLOCK_SIZE):
        codes = grids[start : start + BLOCK_SIZE].tobytes()
        parts += [codes, google_crc32c.value(codes).to_bytes(_CHECK, "little")]
    return b"".join(parts)


def _head_checksum(head: bytes, rest: bytes) -> int:
    """Of all that isn't blocks, the checksum itself left out."""
    return google_crc32c.extend(google_crc32c.value(head[: _HEAD.size - _CHECK]), rest)


def _damaged(where: Where, reason: str) -> DamagedError:
    return DamagedError(f"{where if isinstance(where, str) else where()}: {reason}")


def unpack(record: bytes, streams: Sequence[int], where: Where) -> list[Scene]:
    """The scenes of a record.

    Args:
      record: as `pack` made it.
      streams: number of streams in each stream set.
      where: the shard and record, for the error, or what tells them.

    Raises:
      DamagedError: not a record of this version, or damaged; names `where`.
    """
    if len(record) < RECORD_HEADER_SIZE:
        raise _damaged(where, f"{len(record)} bytes are too few for a record")
    magic, version, count, checksum = _HEAD.unpack_from(record)
    if magic != MAGIC or version != VERSION:
        raise _damaged(where, f"found {magic!r} version {version}, wanted {MAGIC!r} version {VERSION}")
    T, stream_set, N = _SHAPE.unpack_from(record, _HEAD.size)
    at = RECORD_HEADER_SIZE
    grids = count * T * streams[stream_set] if stream_set < len(streams) else 0
    begun = len(record) - blocks_size(grids, N)  # of the blocks
    lengths = np.frombuffer(record, "<u2", count, at + 4 * count) if at + 6 * count <= begun else np.zeros(0)
    if grids < 1 or at + 6 * count + int(lengths.sum()) != begun:
        raise _damaged(where, f"damaged: {len(record)} bytes don't hold {count} scenes of {T} frames")
    codes = unpack_blocks(record[begun:], grids, N)
    if codes is None or _head_checksum(record, record[_HEAD.size : begun]) != checksum:
        raise _damaged(where, CHECKSUM_MISMATCH)
    class_ids = np.frombuffer(record, "<i4", count, at)
    at += 6 * count
    keys = []
    for length in lengths.tolist():
        keys.append(record[at : at + length].decode())
        at += length
    codes = codes.reshape(count, T, streams[stream_set], N)
    return [
        Scene(*parts) for parts in zip(keys, class_ids.tolist(), [stream_set] * count, codes, strict=True)
    ]


def unpack_blocks(blocks: bytes, grids: int, codes_per_image: int) -> np.ndarray | None:
    """All `grids` of a record, uint16 [grids, N], of its blocks; None where these are damaged."""
    stride = blocks_size(BLOCK_SIZE, codes_per_image)
    pieces = [blocks[start : start + stride] for start in range(0, len(blocks), stride)]
    if _first_damaged(pieces) is not None:
        return None
    return np.frombuffer(b"".join([piece[:-_CHECK] for piece in pieces]), "<u2").reshape(
        grids, codes_per_image
    )


def _first_damaged(blocks: Sequence[bytes]) -> int | None:
    checks = list(map(google_crc32c.value, blocks))
    return None if checks.count(_RESIDUE) == len(checks) else [c != _RESIDUE for c in checks].index(True)


def first_damaged_block(content: bytes, starts: np.ndarray, sizes: np.ndarray) -> int | None:
    """The first of the blocks of so many bytes that doesn't fit its checksum; None if all do."""
    stops = starts + sizes
    return _first_damaged([content[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])


def gather_grids(blocks: bytes, offsets: np.ndarray, codes_per_image: int) -> np.ndarray:
    """The grids that begin at `offsets` of some blocks, int64 [n], in bytes: uint16 [n, N]."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(blocks, "<u2"), codes_per_image)
    return windows[offsets // 2]
