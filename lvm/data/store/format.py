"""Layout of a shard's two files (store version 4), all numbers little-endian.

CODES holds the grids of all scenes and nothing else, scene after scene, frame-major: uint16 × N each, so that
`numpy.memmap(path, "<u2").reshape(-1, N)` opens it. The grid of a frame and a stream of a scene is the bytes
[2·N·g, 2·N·(g + 1)) with g = first grid + frame · streams + stream.

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
BLOCK_SIZE = 4  # grids per checksum: 2 KiB of 256 codes each, half of a disk's 4 KiB block
SCENE_DTYPE = np.dtype(
    [("group", "<u8"), ("first_grid", "<u4"), ("class_id", "<i4"), ("frames", "<u2"), ("stream_set", "<u2")]
)
MAX_STREAM_SETS, MAX_FRAMES = 2**16, 2**16 - 1  # of a store or shard, of a scene
MAX_SIZE = 2**32 - 1  # grids of a shard, bytes of its keys
ENTRY_DTYPE = np.dtype([*SCENE_DTYPE.descr, ("shard", "<i4")])  # of a scene, and its shard
SECTIONS = {
    "scenes": SCENE_DTYPE,
    "checksums": np.dtype("<u4"),  # CRC-32C of each `BLOCK_SIZE` grids of the file of codes
    "key_offsets": np.dtype("<u4"),  # of the scenes' keys in "keys", and their end
    "keys": np.dtype("u1"),  # UTF-8
    "mark_offsets": np.dtype("<u8"),  # of the scenes' marks in "marks", and their end; empty if no scene has any
    "marks": np.dtype("u1"),
    "names": np.dtype("u1"),  # of the shard's classes and stream sets: `pack_names`
    "histogram": np.dtype("<u8"),  # of the shard's codes
}
CHECKSUM_MISMATCH = "checksum mismatch"
_ALIGNMENT = 8  # of sections, in bytes


class DamagedError(UserError):
    """Corrupted codes. The message names the shard, and the scenes and frames of the block."""


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


def checksum_blocks(content: bytes, codes_per_image: int) -> list[int]:
    """CRC-32C of each block of the grids in `content`, whose first begins a block."""
    stride = BLOCK_SIZE * 2 * codes_per_image
    return [google_crc32c.value(content[start : start + stride]) for start in range(0, len(content), stride)]


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
    data: UInt8[np.ndarray, " bytes"], name: str, dtype: np.dtype, located: Mapping[str, int], count: int | None
) -> np.ndarray:
    """A section of an index file, without a copy.

    Args:
      data: the file.
      name: of the section.
      dtype: of its items.
      located: where it is, as `pack_sections` returned it.
      count: its number of items, None for any.

    Raises:
      UserError: it is corrupted.
    """
    start = located["offset"]
    section = data[start : start + located["bytes"]]
    if google_crc32c.value(section) != located["crc32c"]:
        raise UserError(f"section {name}: {CHECKSUM_MISMATCH}")
    actual = len(section) / dtype.itemsize
    if actual != (round(actual) if count is None else count):
        raise UserError(f"section {name}: {actual:g} items, expected {count}")
    return section.view(dtype)
