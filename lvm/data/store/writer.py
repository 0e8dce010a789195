"""Store writer (`lvm.data.store.reader`): shards, an entry after each, and the manifest from all entries."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, BinaryIO

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture import split
from lvm.data.store import format
from lvm.data.store.format import PAGE_SIZE, RECORD_DTYPE, SCENE_DTYPE, Scene
from lvm.data.store.reader import HEADER, MANIFEST, VERSION
from lvm.data.store.records import INDEX_SUFFIX, RECORDS_SUFFIX, read_ranges

_ABANDONED_S = 5.0  # age after which a temporary file of a process that no longer runs is removed
_OPTIONS = "group_size:1,uncompressed"
_MAX_RECORD_GAP = 2**12  # bytes searched for the next record; ArrayRecord puts far fewer between two


@dataclasses.dataclass(frozen=True)
class GroupedScene:
    """A scene to write, and the name of its group (the original image or video)."""

    scene: Scene
    group: str


@dataclasses.dataclass
class SkippedItems:
    """Items of a shard's range of the source that are not in the shard; filled while the range is read.

    Attributes:
      failures: their {"key", "reason"}.
      groups: hashes of unreadable groups: the held-out split is computed from all groups of the source.
    """

    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)


def shard_name(shard: int, num_shards: int) -> str:
    return f"shard-{shard:05d}-of-{num_shards:05d}"


def write_shard(
    folder: epath.PathLike, shard: int, num_shards: int, scenes: Iterable[GroupedScene], num_codes: int,
    skipped: SkippedItems | None = None, versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes one shard, its index and, last, its entry; returns the entry.

    Args:
      folder: the store.
      scenes: of the shard, in order.
      num_codes: codebook size, for the histogram.
      skipped: items that are not in the shard; read once `scenes` is exhausted.
      versions: of the software that made the codes.

    Raises:
      UserError: another process on this machine is writing the shard.
    """
    skipped, folder = skipped or SkippedItems(), epath.Path(folder)
    name = shard_name(shard, num_shards)
    with contextlib.ExitStack() as stack:
        scratch = epath.Path(stack.enter_context(_scratch_folder(folder)))
        records, index = (scratch / f".{name}{suffix}.tmp" for suffix in (RECORDS_SUFFIX, INDEX_SUFFIX))
        stack.enter_context(_lock_shard(records))
        temporary = {f"{name}{RECORDS_SUFFIX}": records, f"{name}{INDEX_SUFFIX}": index}
        for path in temporary.values():
            stack.callback(path.unlink, missing_ok=True)
        statistics = ShardStatistics(num_codes)
        with files.clear_disk_errors(records):
            scene_index, record_index = _write_records(records, scenes, statistics)
        index.write_bytes(scene_index.tobytes() + record_index.tobytes())
        entry = {
            "name": name,
            **statistics.to_json(),
            "records": len(record_index),
            "group_hashes": _extremes(scene_index["group"].tolist() + skipped.groups),
            "failures": skipped.failures,
            "versions": dict(versions or {}),
            "files": {
                final: {"bytes": files.file_size(path), "sha256": files.sha256(path)}
                for final, path in temporary.items()
            },
        }
        for final, path in temporary.items():
            files.put(path, folder / final)
    files.write_json(folder / f"{name}.json", entry)
    return entry


def _scratch_folder(folder: epath.Path) -> contextlib.AbstractContextManager[str]:
    """A local folder for unfinished files: the store itself if it is local."""
    return tempfile.TemporaryDirectory() if files.is_remote(folder) else contextlib.nullcontext(str(folder))


def _lock_shard(path: epath.Path) -> IO[str]:
    """Refuses a shard that another process writes: checksums would cover a mix of both."""
    lock = files.lock_file(path)
    if lock is None:
        raise UserError(f"{path}: another process is writing this shard; give each process its own --shard")
    return lock


class ShardStatistics:
    """Counts of a shard's records for its entry."""

    def __init__(self, num_codes: int):
        self._num_scenes = 0
        self._images: Counter[int] = Counter()  # by stream set
        self._histogram = np.zeros(num_codes, np.int64)

    def add(self, record: int, scenes: Sequence[Scene], groups: Sequence[int]) -> list[tuple[int, ...]]:
        """Counts the scenes of a record and returns their `SCENE_DTYPE` fields; `groups` are hashes."""
        T, S, _ = scenes[0].codes.shape
        self._num_scenes += len(scenes)
        self._images[scenes[0].stream_set] += len(scenes) * T * S
        codes = np.concatenate([scene.codes.ravel() for scene in scenes])
        self._histogram += np.bincount(codes, minlength=len(self._histogram))
        return [
            (record, T, slot, scene.stream_set, scene.class_id, group)
            for slot, (scene, group) in enumerate(zip(scenes, groups, strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "scenes": self._num_scenes,
            "images": int(sum(self._images.values())),
            "images_by_stream_set": {str(i): count for i, count in sorted(self._images.items())},
            "histogram": self._histogram.tolist(),
        }


def _write_records(
    path: epath.Path, scenes: Iterable[GroupedScene], statistics: ShardStatistics
) -> tuple[np.ndarray, np.ndarray]:
    """Writes and counts a shard's records; returns `SCENE_DTYPE` of its scenes and `RECORD_DTYPE` of its records."""
    pages: dict[int, list[GroupedScene]] = {}  # stream set → single-image scenes of its unfinished page
    index: list[tuple[int, ...]] = []
    records: list[tuple[bytes, int, int, int]] = []
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)

    def write(page: Sequence[GroupedScene]) -> None:
        scenes, groups = [item.scene for item in page], [split.group_hash(item.group) for item in page]
        record = format.pack(scenes)
        writer.write(record)
        index.extend(statistics.add(len(records), scenes, groups))
        T, S, N = scenes[0].codes.shape
        records.append((record[: format.RECORD_HEADER_SIZE], len(record), len(page) * T * S, N))

    for item in scenes:
        frames, streams, _ = item.scene.codes.shape
        if frames * streams > 1:
            write([item])
            continue
        page = pages.setdefault(item.scene.stream_set, [])
        page.append(item)
        if len(page) == PAGE_SIZE:
            write(pages.pop(item.scene.stream_set))
    for stream_set in sorted(pages):
        write(pages[stream_set])
    writer.close()
    return np.array(index, SCENE_DTYPE), _locate_blocks(path, records)


def _locate_blocks(path: epath.Path, records: Sequence[tuple[bytes, int, int, int]]) -> np.ndarray:
    """Reads all records back, checks them, and returns where their blocks begin.

    Args:
      path: the file.
      records: header, bytes, grids and codes per image of each record written to it.

    Raises:
      UserError: a record is not in the file as written.
    """
    located, end = np.zeros(len(records), RECORD_DTYPE), 0
    with open(path, "rb") as file:
        for i, (header, size, num_grids, codes_per_image) in enumerate(records):
            gap = _read(file, end, _MAX_RECORD_GAP).find(header)
            blocks_size = format.blocks_size(num_grids, codes_per_image)
            start, end = end + gap + size - blocks_size, end + gap + size
            blocks = _read(file, start, blocks_size)
            if gap < 0 or format.unpack_blocks(blocks, num_grids, codes_per_image) is None:
                raise UserError(
                    f"{path}: record {i} is not there as it was written: a disk fault, or a version of array_record "
                    "with another file layout"
                )
            located[i] = start, num_grids
    return located


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    return read_ranges([file.fileno()], np.array([offset]), np.array([size]))


def read_shard_entry(folder: epath.PathLike, shard: int, num_shards: int) -> dict[str, Any] | None:
    """The entry of a finished shard; None if there is none, or a file that it lists is missing or has another size."""
    path = epath.Path(folder) / f"{shard_name(shard, num_shards)}.json"
    entry = files.read_side_file(path)
    listed = {name: properties["bytes"] for name, properties in entry.get("files", {}).items()}
    return entry if listed and listed == {name: files.file_size(path.parent / name) for name in listed} else None


def begin_store(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> None:
    """Begins or resumes a store; a folder never gets shards of two kinds.

    Args:
      folder: the store.
      header: metadata of all shards for the manifest, JSON.
      num_shards: number of shards.

    Raises:
      UserError: the folder holds something else, or a store with another header.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / HEADER, files.as_json({"version": VERSION, **header, "num_shards": num_shards})
    if path.exists():
        old = files.read_json(path)
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if keys:
            changes = ", ".join(_describe_change(key, old.get(key), new.get(key)) for key in keys)
            raise UserError(
                f"{folder}: holds codes made with other settings (changed: {changes}); choose another --out, or its "
                "settings"
            )
        return
    # On gs:// a folder exists once it has an object.
    if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty and not a store; choose a new folder for --out")
    files.write_json(path, new)


def _describe_change(key: str, old: Any, new: Any) -> str:
    return key if isinstance(old, (dict, list)) or isinstance(new, (dict, list)) else f"{key}: {old} → {new}"


def finish_store(folder: epath.PathLike) -> list[str]:
    """Writes the manifest if all shards are finished; returns the names of those that are not.

    Any process may call it, repeatedly: the manifest depends on the shards alone.

    Raises:
      UserError: the folder has no header, or one of another version.
    """
    folder = epath.Path(folder)
    if not (folder / HEADER).exists():
        raise UserError(f"{folder}: not a store ({HEADER} is missing)")
    header = files.read_json(folder / HEADER)
    if (version := header.pop("version", None)) != VERSION:
        raise UserError(
            f"{folder / HEADER}: version {version}, this writes version {VERSION}; encode it again, into a new folder"
        )
    missing = write_manifest(folder, header, header.pop("num_shards"))
    if not missing and not files.is_remote(folder):
        _remove_leftovers(pathlib.Path(folder))
    return missing


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes temporary files of processes that were killed while writing an entry or a manifest."""
    for file in folder.glob(".*.json.*.tmp"):
        process = file.name.split(".")[-2]
        with contextlib.suppress(FileNotFoundError):
            # A process of another host can't be looked up: its recent files may still be in use.
            is_old = time.time() - file.stat().st_mtime > _ABANDONED_S
            if is_old and not pathlib.Path("/proc", process).exists():
                file.unlink()


def write_manifest(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> list[str]:
    """`finish_store` with a given header."""
    entries = {shard_name(i, num_shards): read_shard_entry(folder, i, num_shards) for i in range(num_shards)}
    missing = [name for name, entry in entries.items() if entry is None]
    if not missing:
        manifest = build_manifest(header, [entry for entry in entries.values() if entry is not None])
        files.write_json(epath.Path(folder) / MANIFEST, manifest)
    return missing


def build_manifest(header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of a store's header (without `num_shards`) and all of its entries."""
    images: Counter[str] = Counter()
    for entry in entries:
        for i, count in entry["images_by_stream_set"].items():
            names = header["stream_sets"][int(i)]
            images.update({name: count // len(names) for name in names})
    versions = {name: {entry["versions"].get(name) for entry in entries} for name in entries[0]["versions"]}
    totals = {
        "scenes": sum(entry["scenes"] for entry in entries),
        "images": sum(entry["images"] for entry in entries),
        "images_by_stream": dict(images),
        "group_hashes": _extremes([hash for entry in entries for hash in entry["group_hashes"]]),
        "histogram": np.sum([entry["histogram"] for entry in entries], axis=0).tolist(),
        "versions": {name: sorted(filter(None, values)) for name, values in versions.items()},
    }
    # Summed fields stay in the entries: thousands of histograms would make the manifest slow to open.
    summed = totals.keys() - {"scenes", "images"} | {"images_by_stream_set"}
    shards = [{key: value for key, value in entry.items() if key not in summed} for entry in entries]
    return {"version": VERSION, **header, **totals, "shards": shards}


def _extremes(hashes: Sequence[int]) -> list[int]:
    return [min(hashes), max(hashes)] if hashes else []
