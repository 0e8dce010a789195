"""Scenes of codes, and how they lie in a record (version 1).

A record is a page: one scene of several images, or up to 64 scenes of a single image each that share their
stream. Little-endian:

    magic "LVMS" | version u16 | scenes u16 | crc32c u32 of all that follows
    frames u32 | stream set u32 | codes an image u32
    class id i32 × scenes | key length u16 × scenes | keys, UTF-8 | codes u16 × (scenes·T·S·N), frame-major
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np

from lvm.errors import UserError

MAGIC, VERSION = b"LVMS", 1
PAGE = 64  # single-image scenes in one record
_MOST = 2**16 - 1  # frames of a scene, and bytes of a key
_HEAD = struct.Struct("<4sHHI")
_SHAPE = struct.Struct("<III")

_HEADS = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("scenes", "<u2"),
        ("checksum", "<u4"),
        ("frames", "<u4"),
        ("stream_set", "<u4"),
        ("codes", "<u4"),
    ]
)  # the fields of both

# One entry a scene, in a file beside each shard.
INDEX = np.dtype(
    [
        ("record", "<u4"),
        ("frames", "<u2"),
        ("slot", "u1"),
        ("stream_set", "u1"),
        ("class_id", "<i4"),
        ("group", "<u8"),
    ]
)


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
    if len(scenes) > 1 and (T * S > 1 or len(scenes) > PAGE):
        raise ValueError(f"a page holds up to {PAGE} scenes of one image, not {len(scenes)} of {T}×{S}")
    if any(scene.codes.shape != (T, S, N) or scene.stream_set != first.stream_set for scene in scenes):
        raise ValueError("the scenes of a page must agree in shape and stream set")
    keys = [scene.key.encode() for scene in scenes]
    if T > _MOST or max(map(len, keys)) > _MOST:
        raise UserError(
            f"{first.key[:80]}: {T} frames, and a key of {max(map(len, keys))} bytes; at most {_MOST} each"
        )
    body = b"".join(
        [
            _SHAPE.pack(T, first.stream_set, N),
            np.array([scene.class_id for scene in scenes], "<i4").tobytes(),
            np.array([len(key) for key in keys], "<u2").tobytes(),
            *keys,
            *(np.ascontiguousarray(scene.codes, "<u2").tobytes() for scene in scenes),
        ]
    )
    return _HEAD.pack(MAGIC, VERSION, len(scenes), google_crc32c.value(body)) + body


def check(record: bytes, where: Where) -> None:
    """Raises DamagedError, naming `where`, for what is too short for a record or doesn't fit its checksum."""
    if len(record) < _HEADS.itemsize:
        reason = f"{len(record)} bytes are too few for a record"
    elif google_crc32c.value(record[_HEAD.size :]) != int.from_bytes(record[8:12], "little"):
        reason = "damaged: the checksum doesn't fit the content"
    else:
        return
    raise _damaged(where, reason)


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
    check(record, where)
    magic, version, count, _ = _HEAD.unpack_from(record)
    if magic != MAGIC or version != VERSION:
        raise _damaged(where, f"found {magic!r} version {version}, wanted {MAGIC!r} version {VERSION}")
    T, stream_set, N = _SHAPE.unpack_from(record, _HEAD.size)
    at = _HEAD.size + _SHAPE.size
    fixed = at + count * (4 + 2 + 2 * T * streams[stream_set] * N)  # bytes without the keys
    lengths = np.frombuffer(record, "<u2", count, at + 4 * count) if fixed <= len(record) else np.zeros(0)
    if fixed + int(lengths.sum()) != len(record):  # the checksum doesn't cover the number of scenes
        raise _damaged(where, f"damaged: {len(record)} bytes don't hold {count} scenes of {T} frames")
    class_ids = np.frombuffer(record, "<i4", count, at)
    at += 6 * count
    keys = []
    for length in lengths.tolist():
        keys.append(record[at : at + length].decode())
        at += length
    codes = np.frombuffer(record, "<u2", offset=at).reshape(count, T, streams[stream_set], N)
    return [
        Scene(*parts) for parts in zip(keys, class_ids.tolist(), [stream_set] * count, codes, strict=True)
    ]


def read_grids(
    records: Sequence[bytes],
    which: np.ndarray,
    entries: np.ndarray,
    frames: np.ndarray,
    columns: np.ndarray,
    streams: Sequence[int],
    codes_per_image: int,
    where: Callable[[int], str],
) -> np.ndarray:
    """Grids out of several records.

    Args:
      records: as `pack` made them.
      which: int [n], the record of each grid.
      entries: `INDEX` [n], the entry of each grid's scene.
      frames: int64 [n], its frame in the scene.
      columns: int64 [n], its column in the scene's stream set.
      streams: number of streams in each stream set.
      codes_per_image: N.
      where: place among `records` → shard and record, for the error.

    Returns:
      uint16 [n, N].

    Raises:
      DamagedError: a record is damaged, or holds other scenes than the index tells.
    """
    for place, record in enumerate(records):
        check(record, lambda place=place: where(place))  # type: ignore[misc]
    head = np.frombuffer(b"".join(record[: _HEADS.itemsize] for record in records), _HEADS)[which]
    sizes = np.array([len(record) for record in records])
    S = np.array(streams)[entries["stream_set"]]  # [n]
    # The codes are the last part of a record, after keys of any length: their place is counted from its end.
    images_left = (head["scenes"].astype(np.int64) - entries["slot"]) * entries["frames"] * S
    offsets = sizes[which] - (images_left - frames * S - columns) * 2 * codes_per_image  # [n], in the record
    fits = (head["magic"] == MAGIC) & (head["version"] == VERSION) & (head["codes"] == codes_per_image)
    fits &= (head["frames"] == entries["frames"]) & (head["stream_set"] == entries["stream_set"])
    fits &= (entries["slot"] < head["scenes"]) & (offsets >= _HEADS.itemsize)
    if not fits.all():
        place = int(which[np.argmin(fits)])
        raise DamagedError(f"{where(place)}: damaged, or the index beside it is: it tells of another scene")
    size = 2 * codes_per_image
    # Grids that lie beside each other, as a video's do, are taken in one piece.
    new = (np.diff(which, prepend=-1) != 0) | (np.diff(offsets, prepend=0) != size)
    first = np.flatnonzero(new)
    ends = offsets[np.append(first[1:], len(offsets)) - 1] + size
    pieces = zip(which[first].tolist(), offsets[first].tolist(), ends.tolist(), strict=True)
    content = b"".join([records[place][start:end] for place, start, end in pieces])
    return np.frombuffer(content, "<u2").reshape(-1, codes_per_image)
