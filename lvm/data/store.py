"""The scene store: ArrayRecord shards, an index beside each, and one manifest.

    STORE/shard-00000-of-00004.array_record   records of `lvm.data.scenes`
    STORE/shard-00000-of-00004.index          `scenes.INDEX` entries, memory-mapped
    STORE/shard-00000-of-00004.json           the shard's entry, written after both
    STORE/manifest.json                       written once all entries are there

A shard counts once its entry stands, the store once its manifest does. Nothing in it tells a time or a host.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm import files
from lvm.data import scenes, split
from lvm.data.scenes import INDEX, PAGE, Scene
from lvm.data.streams import Codec, codec_from_json
from lvm.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
_KEYS = {"version", "tokenizer", "streams", "stream_sets", "classes", "group_hashes", "shards"}
_OPTIONS = "group_size:1,uncompressed"
_RECENT_BYTES = (
    2**26
)  # records that a process keeps, of all stores: where neighbours are read soon, each comes once


@dataclasses.dataclass(frozen=True)
class GroupedScene:
    """A scene on its way into a store, with the name of its group (the original image or video)."""

    scene: Scene
    group: str


def shard_name(shard: int, num_shards: int) -> str:
    return f"shard-{shard:05d}-of-{num_shards:05d}"


def write_shard(
    folder: epath.PathLike,
    shard: int,
    num_shards: int,
    content: Iterable[GroupedScene],
    num_codes: int,
    failures: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Writes one shard, its index and, last, its entry; returns the entry.

    Args:
      folder: the store.
      shard, num_shards: which one of how many.
      content: its scenes, in order.
      num_codes: size of the codebook, for the histogram.
      failures: {"key", "reason"} of the items that aren't in the shard; read after `content` is exhausted.
    """
    path = epath.Path(folder) / shard_name(shard, num_shards)
    record_path = path.with_suffix(".array_record")
    temporary = path.parent / f".{record_path.name}.tmp"
    try:
        with files.clear_disk_errors(temporary):
            entries, histogram = _write_records(temporary, content, num_codes)
        files.flush(temporary)
        os.replace(temporary, record_path)
    finally:
        temporary.unlink(missing_ok=True)
    index = np.array(entries, INDEX)
    files.write_atomically(path.with_suffix(".index"), index.tobytes())
    entry = {
        "name": path.name,
        "scenes": len(index),
        "images": int(histogram.images),
        "histogram": histogram.counts.tolist(),
        "failures": list(failures),
        "files": {
            file.name: {"bytes": file.stat().length, "sha256": files.sha256(file)}
            for file in (record_path, path.with_suffix(".index"))
        },
    }
    files.write_json(path.with_suffix(".json"), entry)
    return entry


class _Histogram:
    def __init__(self, num_codes: int):
        self.counts, self.images = np.zeros(num_codes, np.int64), 0

    def add(self, codes: np.ndarray) -> None:
        self.counts += np.bincount(codes.ravel(), minlength=len(self.counts))
        self.images += codes.shape[0] * codes.shape[1]


def _write_records(
    path: epath.Path, content: Iterable[GroupedScene], num_codes: int
) -> tuple[list[tuple[int, ...]], _Histogram]:
    entries: list[tuple[int, ...]] = []
    pages: dict[int, list[GroupedScene]] = {}  # stream set → single-image scenes that wait for their page
    histogram, records = _Histogram(num_codes), 0
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)

    def write(page: Sequence[GroupedScene]) -> None:
        nonlocal records
        writer.write(scenes.pack([item.scene for item in page]))
        for slot, item in enumerate(page):
            scene = item.scene
            group = split.group_hash(item.group)
            entries.append((records, len(scene.codes), slot, scene.stream_set, scene.class_id, group))
            histogram.add(scene.codes)
        records += 1

    for item in content:
        frames, streams, _ = item.scene.codes.shape
        if frames * streams > 1:
            write([item])
            continue
        page = pages.setdefault(item.scene.stream_set, [])
        page.append(item)
        if len(page) == PAGE:
            write(pages.pop(item.scene.stream_set))
    for stream_set in sorted(pages):
        write(pages[stream_set])
    writer.close()
    return entries, histogram


def read_entry(folder: epath.PathLike, shard: int, num_shards: int) -> dict[str, Any] | None:
    """A finished shard's entry, or None; also where a file that it lists is gone or has another size."""
    path = epath.Path(folder) / f"{shard_name(shard, num_shards)}.json"
    if not path.exists():
        return None
    entry = files.read_json(path)
    whole = all(_size(path.parent / name) == listed["bytes"] for name, listed in entry["files"].items())
    return entry if whole else None


def write_manifest(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> bool:
    """Writes the manifest if all entries stand; returns whether they do. Writing it again changes nothing."""
    entries = [read_entry(folder, shard, num_shards) for shard in range(num_shards)]
    if any(entry is None for entry in entries):
        return False
    files.write_json(epath.Path(folder) / MANIFEST, {"version": VERSION, **header, "shards": entries})
    return True


class _Recent:
    """The records that were read last, up to a number of bytes in all."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._records: collections.OrderedDict[Any, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, keys: Sequence[Any], read: Callable[[list[int]], list[bytes]]) -> list[bytes]:
        """The records of `keys`; `read` gets the places of those that aren't here."""
        with self._lock:
            found = [self._records.get(key) for key in keys]
            missing = [place for place, record in enumerate(found) if record is None]
            for key, record in zip(keys, found, strict=True):
                if record is not None:
                    self._records.move_to_end(key)
        new = read(missing) if missing else []
        with self._lock:
            for place, record in zip(missing, new, strict=True):
                found[place] = record
                if self._records.setdefault(keys[place], record) is record:
                    self._bytes += len(record)
            while self._bytes > self._limit:
                self._bytes -= len(self._records.popitem(last=False)[1])
        return found  # type: ignore[return-value]


_recent = _Recent(_RECENT_BYTES)


class Store:
    """A finished store, read by random access. Opening it reads the manifest and maps the indexes.

    It may be sent to another process, which opens it again.

    Attributes:
      manifest: as written.
      streams: stream name → codec.
      stream_sets: the names of the streams of each set.
      classes: class names.
      indexes: `scenes.INDEX` entries of each shard's scenes, memory-mapped.

    Raises:
      UserError: not a store, another version, or a shard whose size is not the manifest's.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.manifest = _read_manifest(self.path)
        self.streams: dict[str, Codec] = {
            name: codec_from_json(codec) for name, codec in self.manifest["streams"].items()
        }
        self.stream_sets = [tuple(names) for names in self.manifest["stream_sets"]]
        self.classes: list[str] = self.manifest["classes"]
        self._num_streams = [len(names) for names in self.stream_sets]
        self._shards = [self.path / entry["name"] for entry in self.manifest["shards"]]
        self.indexes = [self._map_index(entry) for entry in self.manifest["shards"]]
        self._starts = np.cumsum([0] + [entry["scenes"] for entry in self.manifest["shards"]])
        self._readers: dict[int, Any] = {}
        self._token = object()  # tells this object's records from those of a store that was here before

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (os.fspath(self.path),)

    @functools.cached_property
    def index(self) -> np.ndarray:
        """`scenes.INDEX` entries of all scenes in memory, shard after shard; `entries` needs none of it."""
        return np.concatenate([np.zeros(0, INDEX), *self.indexes])

    def entries(self, numbers: np.ndarray) -> np.ndarray:
        """The `scenes.INDEX` entries of the scenes at `numbers`, int64 [n]."""
        found = np.zeros(len(numbers), INDEX)
        for shard, mine in self._by_shard(numbers):
            found[mine] = self.indexes[shard][numbers[mine] - self._starts[shard]]
        return found

    def grids(self, numbers: np.ndarray, frames: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Single grids, each record read once: uint16 [n, N].

        Args:
          numbers: int64 [n], the scene of each.
          frames: int64 [n], its frame.
          columns: int64 [n], its place in the scene's stream set.

        Raises:
          UserError: a record is damaged; names shard and record.
        """
        codes = np.empty((len(numbers), self.codes_per_image), np.uint16)
        entries = self.entries(numbers)
        for shard, mine in self._by_shard(numbers):
            records, which = np.unique(entries["record"][mine], return_inverse=True)
            codes[mine] = scenes.read_grids(
                self._read(shard, records),
                which,
                entries[mine],
                frames[mine],
                columns[mine],
                self._num_streams,
                self.codes_per_image,
                lambda place, shard=shard, records=records: self._where(shard, records[place]),  # type: ignore
            )
        return codes

    @property
    def codes_per_image(self) -> int:
        height, width = self.manifest["tokenizer"]["grid"]
        return height * width

    @property
    def num_codes(self) -> int:
        return self.manifest["tokenizer"]["num_codes"]

    def identity(self) -> str:
        """A hash of the manifest, and so of every shard's checksum."""
        return files.sha256(self.path / MANIFEST)

    def heldout(self, fraction: float, entries: np.ndarray | None = None) -> np.ndarray:
        """bool [n]: which of the scenes of `entries` (of all) are held out, as `lvm.data.split` says of the source."""
        lowest, highest = self.manifest["group_hashes"]
        groups = (self.index if entries is None else entries)["group"]
        return split.heldout(groups, fraction, (lowest, highest))

    def scene(self, number: int) -> Scene:
        """The scene at `number` in [0, len).

        Raises:
          UserError: its record is damaged; names shard and record.
        """
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        entry = self.indexes[shard][number - self._starts[shard]]
        where = self._where(shard, entry["record"])
        data = self._read(shard, [entry["record"]])[0]
        page = scenes.unpack(data, self._num_streams, where)
        scene = page[entry["slot"]] if entry["slot"] < len(page) else None
        if scene is None or (len(scene.codes), scene.stream_set) != (entry["frames"], entry["stream_set"]):
            raise UserError(f"{where}: the index beside it is damaged: it tells of another scene")
        return scene

    def videos(self, stream: str, min_frames: int, limit: int) -> list[np.ndarray]:
        """Codes uint16 [T, N] of a stream, of at most `limit` scenes that have it and as many frames."""
        has = np.array([stream in names for names in self.stream_sets], bool)
        numbers = np.flatnonzero(has[self.index["stream_set"]] & (self.index["frames"] >= min_frames))
        scenes = [self.scene(int(number)) for number in numbers[:limit]]
        return [scene.codes[:, self.stream_sets[scene.stream_set].index(stream)] for scene in scenes]

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The shards of the scenes at `numbers`, each with the places of its own."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            yield shard, np.flatnonzero(shards == shard)

    def _where(self, shard: int, record: Any) -> str:
        return f"{self.path}/{self._shards[shard].name}.array_record, record {record}"

    def _read(self, shard: int, records: Sequence[int] | np.ndarray) -> list[bytes]:
        numbers = [int(record) for record in records]

        def read(places: list[int]) -> list[bytes]:
            wanted = [numbers[place] for place in places]
            try:
                return self._reader(shard).read(wanted)
            except (IndexError, ValueError, RuntimeError) as error:
                listed = f"{wanted[0]} or another of {len(wanted)}" if len(wanted) > 1 else str(wanted[0])
                raise UserError(f"{self._where(shard, listed)}: can't be read: {error}") from error

        return _recent.read([(self._token, shard, number) for number in numbers], read)

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            path = self._shards[shard].with_suffix(".array_record")
            self._readers[shard] = array_record_module.ArrayRecordReader(
                os.fspath(path), "readahead_buffer_size:0"
            )
        return self._readers[shard]

    def _map_index(self, entry: Mapping[str, Any]) -> np.ndarray:
        for name, expected in entry["files"].items():
            file, size = self.path / name, _size(self.path / name)
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{file}: {found}, the manifest says {expected['bytes']}; encode it again")
        if not entry["scenes"]:
            return np.zeros(0, INDEX)
        return np.memmap(self.path / f"{entry['name']}.index", INDEX, mode="r").view(np.ndarray)


def _size(file: epath.Path) -> int | None:
    return file.stat().length if file.exists() else None


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise UserError(f"{path}: not a finished store ({MANIFEST} is missing); tokenizer.encode writes one")
    manifest = files.read_json(file)
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        raise UserError(f"{file}: not a store's manifest; it needs {', '.join(sorted(_KEYS))}")
    if manifest["version"] != VERSION:
        raise UserError(f"{file}: version {manifest['version']!r}, this reads version {VERSION}")
    return manifest
