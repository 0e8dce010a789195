"""Files of a store's shards: opened on first use, local or staged, with random access to scenes and grids."""

import contextlib
import dataclasses
import errno
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from etils import epath
from jaxtyping import Int, Shaped, UInt16

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import format, staging
from lvm.data.store.format import BLOCK_SIZE, CODES_SUFFIX, INDEX_SUFFIX, DamagedError, Scene

FILE_CHECKSUM_MISMATCH = "damaged: checksum differs from the manifest's"
_MAX_BLOCKS = 2**32  # of a shard; shard · this + block is a key that sorts by both
_MAX_GAP = 4  # blocks between two others that are cheaper to read than to skip


@dataclasses.dataclass(frozen=True)
class StoreIds:
    """Ids of names in a store: class name → id, streams of a set → id."""

    classes: Mapping[str, int]
    stream_sets: Mapping[tuple[str, ...], int]


class Shard:
    """The two files of a shard on local disk, opened on first use.

    Args:
      name: of the file of codes, for messages.
      entry: of the shard, or the part of it that the manifest has.
      codes_per_image: N.
      ids: of the classes and stream sets that `scenes` returns.
      locate: suffix → local path of the file; raises UserError if it is missing or has another size than in the entry.
    """

    def __init__(
        self, name: str, entry: Mapping[str, Any], codes_per_image: int, ids: StoreIds,
        locate: Callable[[str], epath.Path],
    ):  # fmt: skip
        self.name, self.entry, self._N = name, entry, codes_per_image
        self._ids, self._locate = ids, locate
        self.num_grids: int = entry["images"]
        self.num_blocks = -(-self.num_grids // BLOCK_SIZE)
        self._sections: dict[str, np.ndarray] = {}

    def section(self, name: str) -> np.ndarray:
        """A section of the memory-mapped index (`format.SECTIONS`), checked on first use.

        Raises:
          UserError: it is corrupted, or the file is missing or differs from the manifest in size.
        """
        if name not in self._sections:
            scenes, located, index = self.entry["scenes"], self.entry["sections"][name], self._index
            count = {"scenes": scenes, "checksums": self.num_blocks, "key_offsets": scenes + 1}.get(name)
            try:
                self._sections[name] = format.unpack_section(index, name, format.SECTIONS[name], located, count)
            except UserError as error:
                raise UserError(f"{self._locate(INDEX_SUFFIX)}: damaged: {error}") from error
        return self._sections[name]

    @functools.cached_property
    def names(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Class names and stream sets by the shard's own ids, which section "scenes" has."""
        return format.unpack_names(self.section("names"))

    def scenes(self, rows: Int[np.ndarray, " n"] | slice = slice(None)) -> Shaped[np.ndarray, " n"]:
        """`SCENE_DTYPE` of some scenes, with the store's ids."""
        scenes, (class_ids, stream_set_ids) = self.section("scenes")[rows], self._store_ids
        if not (_is_identity(class_ids[:-1]) and _is_identity(stream_set_ids)):
            scenes = np.array(scenes)
            scenes["class_id"] = class_ids[scenes["class_id"]]
            scenes["stream_set"] = stream_set_ids[scenes["stream_set"]]
        return scenes

    @functools.cached_property
    def _store_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """The store's ids of the shard's classes, with -1 at the end, and of its stream sets."""
        classes, stream_sets = self.names
        class_ids = np.array([*(self._ids.classes[name] for name in classes), -1], np.int32)
        return class_ids, np.array([self._ids.stream_sets[names] for names in stream_sets], np.uint16)

    def key(self, i: int) -> str:
        """The key of scene `i`."""
        return self._item("key", i).decode()

    def scene(self, i: int) -> Scene:
        """Reads scene `i`. Raises DamagedError, like `read`."""
        group, first, class_id, frames, stream_set = self.section("scenes")[i].item()
        classes, stream_sets = self.names
        class_name, streams = classes[class_id] if class_id >= 0 else "", stream_sets[stream_set]
        start, end = first // BLOCK_SIZE, -(-(first + frames * len(streams)) // BLOCK_SIZE)
        content, skipped = self.read(start, end), first - start * BLOCK_SIZE
        if damaged := self.damaged_blocks(content, start):
            raise self.damage(damaged[0])
        codes = np.frombuffer(content, "<u2", frames * len(streams) * self._N, skipped * 2 * self._N)
        marks = self._item("mark", i) if len(self.section("mark_offsets")) else b""
        return Scene(self.key(i), class_name, streams, codes.reshape(frames, len(streams), self._N), group, marks)

    def read(self, start: int, end: int) -> bytes:
        """Reads the blocks [start, end), unchecked. Unreadable bytes are zeros, which fail their checksum."""
        grids = min(end * BLOCK_SIZE, self.num_grids) - start * BLOCK_SIZE
        size, offset = grids * 2 * self._N, start * BLOCK_SIZE * 2 * self._N
        try:
            return os.pread(self.file.fileno(), size, offset).ljust(size, b"\0")
        except OSError:
            return bytes(size)

    def damaged_blocks(self, content: bytes, start: int) -> list[int]:
        """The blocks whose checksum is wrong; `content` is that of the blocks from `start` on."""
        actual = format.checksum_blocks(content, self._N)
        expected = self.section("checksums")[start : start + len(actual)].tolist()
        if actual == expected:
            return []
        return [start + i for i, pair in enumerate(zip(actual, expected, strict=True)) if pair[0] != pair[1]]

    def damage(self, block: int) -> DamagedError:
        """The error for a corrupted block; names its scenes and frames."""
        scenes, first = self.section("scenes"), block * BLOCK_SIZE
        frames: dict[int, list[int]] = {}
        for grid in range(first, min(first + BLOCK_SIZE, self.num_grids)):
            i = int(np.searchsorted(scenes["first_grid"], grid, side="right")) - 1
            num_streams = len(self.names[1][scenes["stream_set"][i]])
            frames.setdefault(i, []).append((grid - int(scenes["first_grid"][i])) // num_streams)
        listed = [
            f"{self.key(i)!r} frame{'s' * (of[0] < of[-1])} {'–'.join(map(str, sorted({of[0], of[-1]})))}"
            for i, of in frames.items()
        ]
        return DamagedError(f"{self.name}, scene {', '.join(listed)}: damaged: {format.CHECKSUM_MISMATCH}")

    def _item(self, kind: str, i: int) -> bytes:
        start, end = self.section(f"{kind}_offsets")[i : i + 2].tolist()
        return self.section(f"{kind}s")[start:end].tobytes()

    @functools.cached_property
    def _index(self) -> np.ndarray:
        with _too_many_files(path := self._locate(INDEX_SUFFIX)):
            return np.memmap(path, np.uint8, mode="r").view(np.ndarray)

    @functools.cached_property
    def file(self) -> BinaryIO:
        """The file of codes."""
        with _too_many_files(path := self._locate(CODES_SUFFIX)):
            return open(path, "rb")


def _is_identity(ids: np.ndarray) -> bool:
    return np.array_equal(ids, np.arange(len(ids)))


def _read_into(file: BinaryIO, target: np.ndarray, offset: int) -> None:
    """Reads bytes; unreadable ones are zeros, which fail their checksum."""
    try:
        size = os.preadv(file.fileno(), [target.data], offset)
    except OSError:
        size = 0
    if size < target.nbytes:
        target.reshape(-1)[size:] = 0


class Shards(Sequence[Shard]):
    """The shards of one store.

    Args:
      path: the store.
      entries: the manifest's entries of the shards.
      stage_to: local folder that shards are copied to before they are read; "" reads them in place.
      identity: hash of the store, which names its folder in `stage_to`.
      codes_per_image: N.
      ids: of the store's classes and stream sets.
    """

    def __init__(
        self, path: epath.Path, entries: Sequence[Mapping[str, Any]], stage_to: str, identity: Callable[[], str],
        codes_per_image: int, ids: StoreIds,
    ):  # fmt: skip
        self._path, self._entries, self._stage_to, self._identity = path, entries, stage_to, identity
        self._N, self._ids = codes_per_image, ids
        self._shards: dict[int, Shard] = {}
        _raise_open_file_limit()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: Any) -> Any:
        if number not in self._shards:
            entry = self._entries[range(len(self))[number]]
            staged = f" (copied to {self._staging_folder()})" if self._stage_to else ""
            name = f"{self._path / entry['name']}{CODES_SUFFIX}{staged}"
            locate = functools.partial(self._local_path, entry)
            self._shards[number] = Shard(name, entry, self._N, self._ids, locate)
        return self._shards[number]

    def grids(self, shards: Int[np.ndarray, " n"], grids: Int[np.ndarray, " n"]) -> UInt16[np.ndarray, "n N"]:
        """Single grids, by shard and position in it; each block is read and checked once.

        Raises:
          DamagedError: a block is corrupted; names its shard, scenes and frames.
        """
        if not len(grids):
            return np.zeros((0, self._N), np.uint16)
        keys, inverse = np.unique(shards.astype(np.int64) * _MAX_BLOCKS + grids // BLOCK_SIZE, return_inverse=True)
        is_start = np.diff(keys, prepend=-_MAX_BLOCKS) > 1 + _MAX_GAP  # of a read; it ends before a gap
        starts, reads = np.flatnonzero(is_start), np.cumsum(is_start) - 1
        lasts = keys[np.append(starts[1:], len(keys)) - 1]
        numbers, blocks = np.divmod(keys, _MAX_BLOCKS)
        shards_read = [self[number] for number in numbers[starts].tolist()]
        num_grids = np.array([shard.num_grids for shard in shards_read])
        first, stop = blocks[starts] * BLOCK_SIZE, np.minimum((lasts % _MAX_BLOCKS + 1) * BLOCK_SIZE, num_grids)
        ends = np.cumsum(stop - first)  # of the reads, in `content`
        content = np.empty((ends[-1], 2 * self._N), np.uint8)
        parts = map(content.__getitem__, map(slice, (ends - stop + first).tolist(), ends.tolist()))
        for shard, part, grid in zip(shards_read, parts, first.tolist(), strict=True):
            _read_into(shard.file, part, grid * 2 * self._N)
        rows = np.append(0, ends)[reads] + (keys - keys[starts][reads]) * BLOCK_SIZE  # of the blocks, in `content`
        slices = map(slice, rows.tolist(), np.minimum(rows + BLOCK_SIZE, ends[reads]).tolist())
        self._check(numbers, blocks, list(map(google_crc32c.value, map(content.__getitem__, slices))))
        return content.view("<u2")[rows[inverse] + grids % BLOCK_SIZE]

    def _check(self, numbers: np.ndarray, blocks: np.ndarray, checksums: Sequence[int]) -> None:
        """Raises DamagedError if the checksum of one of these blocks of shards, sorted, isn't that of the index."""
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        shards = [self[number] for number in numbers[starts].tolist()]
        parts = np.split(blocks, starts[1:])
        expected = [shard.section("checksums")[part] for shard, part in zip(shards, parts, strict=True)]
        wrong = np.flatnonzero(np.concatenate(expected) != np.array(checksums, np.uint32))
        if len(wrong):
            raise self[int(numbers[wrong[0]])].damage(int(blocks[wrong[0]]))

    def _staging_folder(self) -> epath.Path:
        return epath.Path(self._stage_to) / self._identity()[:16]

    def _local_path(self, entry: Mapping[str, Any], suffix: str) -> epath.Path:
        """A shard's file on local disk, staged first if need be."""
        name = entry["name"] + suffix
        path, expected = self._path / name, entry["files"][name]
        if self._stage_to:
            return staging.stage(path, expected, self._staging_folder())
        if files.is_remote(path):
            raise UserError(
                f"{self._path}: shards are read from local disk; set --config.data.stage_to (or --stage_to) to a "
                "folder to copy them to"
            )
        check_size(path, expected)
        return path


@functools.cache
def _raise_open_file_limit() -> None:
    """Raises this process's limit of open files to the hard limit: a shard takes two, the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems report "unlimited" and refuse it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _too_many_files(path: epath.Path) -> Iterator[None]:
    """Turns the error for too many open files into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"{path}: {error.strerror}: a shard takes two, this process may open {soft}; raise ulimit -n"
        ) from error


def check_size(path: epath.Path, expected: Mapping[str, Any]) -> None:
    """Raises UserError if a file is missing, or its size is not the {"bytes"} that the manifest has."""
    size = files.file_size(path)
    if size != expected["bytes"]:
        actual = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{path}: {actual}, the manifest says {expected['bytes']}; encode it again")
