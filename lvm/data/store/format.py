"""Layout of a shard's two files (store version 4), all numbers little-endian.

CODES holds the grids of all scenes, scene after scene, frame-major, each followed by its checksum: uint16 × N and a
CRC-32C, so that `numpy.memmap(path, "<u2").reshape(-1, N + 2)[:, :N]` opens it. The grid of a frame and a stream of a
scene is at [R·g, R·(g + 1)) with R = 2·N + 4 bytes and g = first grid + frame · streams + stream: one request to an
object store gets it with all that verifies it. The checksum goes on from that of g, so that a grid read from another
place is damaged, too.

INDEX holds the sections of `SECTIONS`; the shard's entry has the offset, size and CRC-32C of each. Its class and stream
set ids are the shard's own, named by its section "names": a shard is encoded without knowledge of the others.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import google_crc32c
import numpy as np
from jaxtyping import UInt8, UInt16

from lvm.common.errors import UserError

VERSION = 4
CODES_SUFFIX, INDEX_SUFFIX = ".codes", ".index"
SCENE_DTYPE = np.dtype(
    [("group", "<u8"), ("first_grid", "<u4"), ("class_id", "<i4"), ("frames", "<u2"), ("stream_set", "<u2")]
)
MAX_STREAM_SETS, MAX_FRAMES = 2**16, 2**16 - 1  # of a store or shard, of a scene
MAX_SIZE = 2**32 - 1  # grids of a shard, bytes of its keys
KIND_DTYPE = np.dtype(
    [("first", "<i8"), ("count", "<i8"), ("class_id", "<i4"), ("frames", "<u2"), ("stream_set", "<u2")]
)  # consecutive scenes of a store, of one kind
ENTRY_DTYPE = np.dtype([*SCENE_DTYPE.descr, ("shard", "<i4")])  # of a scene, and its shard
SECTIONS = {
    "scenes": SCENE_DTYPE,
    "key_offsets": np.dtype("<u4"),  # of the scenes' keys in "keys", and their end
    "keys": np.dtype("u1"),  # UTF-8
    "mark_offsets": np.dtype("<u8"),  # of the scenes' marks in "marks", and their end; empty if no scene has any
    "marks": np.dtype("u1"),
    "names": np.dtype("u1"),  # of the shard's classes and stream sets: `pack_names`
    "histogram": np.dtype("<u8"),  # of the shard's codes
}
CHECKSUM_MISMATCH = "checksum mismatch"
_CHECKSUM_BYTES = 4
_RESIDUE = google_crc32c.value(bytes(_CHECKSUM_BYTES))  # CRC-32C of any content with its own CRC-32C at the end
_ALIGNMENT = 8  # of sections, in bytes


class DamagedError(UserError):
    """Corrupted codes. The message names the shard, the scene and the frame."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """T frames × S streams of grids of N codes.

    Attributes:
      key: unique in its store.
      class_name: "" for none.
      streams: their names.
      codes: frame-major.
      group: hash of the original image or video (`lvm.data.mixture.split.group_hash`).
      marks: serialized annotations.
    """

    key: str
    class_name: str
    streams: tuple[str, ...]
    codes: UInt16[np.ndarray, "T S N"]
    group: int
    marks: bytes = b""


def shard_name(shard: int, num_shards: int) -> str:
    return f"shard-{shard:05d}-of-{num_shards:05d}"


def grid_bytes(codes_per_image: int) -> int:
    """Bytes of a grid and its checksum in the file of codes."""
    return 2 * codes_per_image + _CHECKSUM_BYTES


def pack_grids(grids: UInt16[np.ndarray, "n N"], first: int) -> bytes:
    """The content of the file of codes from the grid number `first` on."""
    codes = np.ascontiguousarray(grids, "<u2").view(np.uint8)
    checksums = np.array(list(map(google_crc32c.extend, range(first, first + len(codes)), codes)), "<u4")
    return np.concatenate([codes, checksums[:, None].view(np.uint8)], axis=1).tobytes()


def damaged_grids(content: UInt8[np.ndarray, "n bytes"], numbers: Sequence[int]) -> list[int]:
    """The indices of the grids, each with its checksum, that are not those of these numbers in their shard."""
    residues = list(map(google_crc32c.extend, numbers, content))
    if residues.count(_RESIDUE) == len(residues):
        return []
    return [i for i, residue in enumerate(residues) if residue != _RESIDUE]


def join_items(kind: str, items: Sequence[bytes]) -> dict[str, bytes]:
    """The two sections of byte strings, one a scene, of kind "key" or "mark"."""
    offsets = np.cumsum([0, *map(len, items)])
    return {
        f"{kind}_offsets": offsets.astype(SECTIONS[f"{kind}_offsets"]).tobytes(),
        f"{kind}s": b"".join(items),
    }


def pack_names(classes: Sequence[str], stream_sets: Sequence[Sequence[str]]) -> bytes:
    """The section of a shard's names, by id."""
    return json.dumps({"classes": list(classes), "stream_sets": [list(names) for names in stream_sets]}).encode()


def unpack_names(section: UInt8[np.ndarray, " bytes"]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Class names and stream sets of a shard, by id."""
    names = json.loads(section.tobytes())
    return names["classes"], [tuple(streams) for streams in names["stream_sets"]]


def pack_sections(sections: Mapping[str, bytes]) -> tuple[bytes, dict[str, dict[str, int]]]:
    """The content of an index file, and where its sections are: name → {"offset", "bytes", "crc32c"}."""
    data, located = bytearray(), {}
    for (name, content), offset in zip(sections.items(), section_offsets(map(len, sections.values())), strict=False):
        data += bytes(offset - len(data)) + content
        located[name] = {"offset": offset, "bytes": len(content), "crc32c": google_crc32c.value(content)}
    return bytes(data), located


def section_offsets(sizes: Iterable[int]) -> list[int]:
    """Offsets of the sections of these sizes in bytes, and the size of the file."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end + -end % _ALIGNMENT)
        end = offsets[-1] + size
    return [*offsets, end]


def unpack_section(
    section: UInt8[np.ndarray, " bytes"], name: str, dtype: np.dtype, crc32c: int, count: int | None
) -> np.ndarray:
    """The items of a section of an index file, without a copy.

    Args:
      section: its bytes.
      name: of the section.
      dtype: of its items.
      crc32c: of its bytes, as `pack_sections` returned it.
      count: its number of items, None for any.

    Raises:
      UserError: it is corrupted.
    """
    if google_crc32c.value(section) != crc32c:
        raise UserError(f"section {name}: {CHECKSUM_MISMATCH}")
    actual = len(section) / dtype.itemsize
    if actual != (round(actual) if count is None else count):
        raise UserError(f"section {name}: {actual:g} items, expected {count}")
    return section.view(dtype)
