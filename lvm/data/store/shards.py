"""Files of a store's shards, local, staged or on object storage: opened on first use, with random access to scenes."""

import contextlib
import dataclasses
import errno
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Shaped, UInt8

from lvm.common import files
from lvm.common.errors import UnavailableError, UserError, check_available
from lvm.common.logging import log_info
from lvm.common.ranges import Range, read_ranges
from lvm.data.store import format, staging
from lvm.data.store.format import CODES_SUFFIX, INDEX_SUFFIX, DamagedError, Scene

FILE_CHECKSUM_MISMATCH = "damaged: checksum differs from the manifest's"
_MAX_OPEN = 512  # files of codes; opening one anew takes microseconds
_LOADED_AT_ONCE = 1024  # sections of indexes
_MAX_MAPPED = 8192  # indexes of a store; Linux allows a process 65,530 maps


@dataclasses.dataclass(frozen=True)
class StoreIds:
    """Ids of names in a store: class name → id, streams of a set → id."""

    classes: Mapping[str, int]
    stream_sets: Mapping[tuple[str, ...], int]


class Shard:
    """The two files of a shard, opened on first use.

    Args:
      name: of the file of codes, for messages.
      entry: of the shard, or the part of it that the manifest has.
      codes_per_image: N.
      ids: of the classes and stream sets that `scenes` returns.
      locate: suffix → path of the file; raises UserError if a local one is missing or has another size than in the
        entry.
    """

    def __init__(
        self, name: str, entry: Mapping[str, Any], codes_per_image: int, ids: StoreIds,
        locate: Callable[[str], epath.Path],
    ):  # fmt: skip
        self.name, self.entry, self._N = name, entry, codes_per_image
        self._ids, self._locate = ids, locate
        self.num_grids: int = entry["images"]
        self._grid_bytes = format.grid_bytes(codes_per_image)
        self._sections: dict[str, np.ndarray] = {}

    def section(self, name: str) -> np.ndarray:
        """A section of the index (`format.SECTIONS`), memory-mapped if that is local; checked on first use.

        Raises:
          UserError: it is corrupted, or the file is missing or differs from the manifest in size.
        """
        if name not in self._sections:
            located = self.entry["sections"][name]
            if (part := self.section_range(name)) is None:
                self.put_section(name, self._index[located["offset"] :][: located["bytes"]])
            else:
                self.put_section(name, np.frombuffer(fetch([part])[0], np.uint8))
        return self._sections[name]

    def section_range(self, name: str) -> Range | None:
        """The bytes of a section on object storage that aren't in memory; None if there is nothing to fetch."""
        path, located = self._locate(INDEX_SUFFIX), self.entry["sections"][name]
        if name in self._sections or not files.is_remote(path):
            return None
        return Range(str(path), located["offset"], located["offset"] + located["bytes"])

    def put_section(self, name: str, content: UInt8[np.ndarray, " bytes"]) -> None:
        """Checks and keeps the bytes of a section. Raises UserError if they are corrupted."""
        scenes, located = self.entry["scenes"], self.entry["sections"][name]
        count = {"scenes": scenes, "key_offsets": scenes + 1}.get(name)
        try:
            self._sections[name] = format.unpack_section(content, name, format.SECTIONS[name], located["crc32c"], count)
        except UserError as error:
            raise UserError(f"{self._locate(INDEX_SUFFIX)}: damaged: {error}") from error

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
        count = frames * len(streams)
        content = self.read(first, count)
        if damaged := format.damaged_grids(content, range(first, first + count)):
            raise self.damage(first + damaged[0])
        codes = content.view("<u2")[:, : self._N].reshape(frames, len(streams), self._N)
        marks = self._item("mark", i) if len(self.section("mark_offsets")) else b""
        return Scene(self.key(i), class_name, streams, codes, group, marks)

    def read(self, first: int, count: int) -> UInt8[np.ndarray, "count bytes"]:
        """Reads grids with their checksums, unchecked. Unreadable bytes are zeros, which fail their checksum."""
        target = np.empty((count, self._grid_bytes), np.uint8)
        if (part := self.codes_range(first, count)) is None:
            self.read_into(target.reshape(-1).data, first)
        else:
            target.reshape(-1)[:] = np.frombuffer(fetch([part])[0], np.uint8)
        return target

    def codes_range(self, first: int, count: int) -> Range | None:
        """The bytes of grids with their checksums on object storage; None if they are on local disk."""
        if not self.is_remote:
            return None
        offset = first * self._grid_bytes
        return Range(str(self._locate(CODES_SUFFIX)), offset, offset + count * self._grid_bytes)

    def read_into(self, target: memoryview, first: int) -> None:
        """`read` into the bytes of some grids, from local disk. Raises UnavailableError as `check_available`."""
        file = _codes_file(self)  # held until the read ends: another thread's files may evict it
        try:
            size = os.preadv(file.descriptor, [target], first * self._grid_bytes)
        except OSError as error:
            check_available(error)
            size = 0
        if size < len(target):
            target[size:] = bytes(len(target) - size)

    @functools.cached_property
    def is_remote(self) -> bool:
        """True if the file of codes is read from object storage."""
        return files.is_remote(self._locate(CODES_SUFFIX))

    def open_codes(self) -> "_OpenFile":
        """Opens the file of codes on local disk."""
        with _too_many_files(path := self._locate(CODES_SUFFIX)):
            return _OpenFile(os.open(path, os.O_RDONLY))

    def damage(self, grid: int) -> DamagedError:
        """The error for a corrupted grid; names its scene and frame."""
        scenes = self.section("scenes")
        i = int(np.searchsorted(scenes["first_grid"], grid, side="right")) - 1
        frame = (grid - int(scenes["first_grid"][i])) // len(self.names[1][scenes["stream_set"][i]])
        return DamagedError(f"{self.name}, scene {self.key(i)!r} frame {frame}: damaged: {format.CHECKSUM_MISMATCH}")

    def _item(self, kind: str, i: int) -> bytes:
        start, end = self.section(f"{kind}_offsets")[i : i + 2].tolist()
        return self.section(f"{kind}s")[start:end].tobytes()

    @functools.cached_property
    def _index(self) -> np.ndarray:
        with _too_many_files(path := self._locate(INDEX_SUFFIX)):
            return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def fetch(parts: Sequence[Range]) -> list[bytes]:
    """`read_ranges` of a store's files. Raises UserError for a missing file, UnavailableError for no answer."""
    try:
        return read_ranges(parts)
    except FileNotFoundError as error:
        raise UserError(f"{error}: is missing, the manifest lists it; encode it again") from error
    except OSError as error:
        raise UnavailableError(" ".join(str(error).split())) from error


class _OpenFile:
    """A file descriptor, closed with its last reference."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@functools.lru_cache(maxsize=_MAX_OPEN)
def _codes_file(shard: Shard) -> _OpenFile:
    """The files of codes of this process that were used last, of all stores."""
    return shard.open_codes()


def _is_identity(ids: np.ndarray) -> bool:
    return np.array_equal(ids, np.arange(len(ids)))


class Shards(Sequence[Shard]):
    """The shards of one store.

    Args:
      path: the store.
      entries: the manifest's entries of the shards.
      stage_to: local folder that whole shards are copied to before they are read; "" reads them in place.
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
            if len(self._shards) >= _MAX_MAPPED and not self.is_remote:
                self._shards.pop(next(iter(self._shards)))
            entry = self._entries[range(len(self))[number]]
            staged = f" (copied to {self._staging_folder()})" if self._stage_to else ""
            name = f"{self._path / entry['name']}{CODES_SUFFIX}{staged}"
            locate = functools.partial(self._locate, entry)
            self._shards[number] = Shard(name, entry, self._N, self._ids, locate)
        return self._shards[number]

    @property
    def is_remote(self) -> bool:
        """True if shards are read from object storage."""
        return files.is_remote(self._path) and not self._stage_to

    def load_sections(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        """Fetches sections of these shards that are on object storage, many at once."""
        parts = [(self[number], name, self[number].section_range(name)) for number in numbers for name in names]
        missing = [(shard, name, part) for shard, name, part in parts if part is not None]
        for start in range(0, len(missing), _LOADED_AT_ONCE):
            chunk = missing[start : start + _LOADED_AT_ONCE]
            size = sum(part.stop - part.start for *_, part in missing if part.stop is not None)
            log_info(f"{self._path}: reads indexes, {start} of {len(missing)} sections, {size / 2**20:,.0f} MiB in all")
            for (shard, name, _), content in zip(chunk, fetch([part for *_, part in chunk]), strict=True):
                shard.put_section(name, np.frombuffer(content, np.uint8))

    def _staging_folder(self) -> epath.Path:
        return epath.Path(self._stage_to) / self._identity()[:16]

    def _locate(self, entry: Mapping[str, Any], suffix: str) -> epath.Path:
        """The path of a shard's file, staged first if need be."""
        name = entry["name"] + suffix
        path, expected = self._path / name, entry["files"][name]
        if self._stage_to:
            return staging.stage(path, expected, self._staging_folder())
        if not files.is_remote(path):  # a request for each file: a range beyond its end is an error, too
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
