"""Writes a store (`lvm.data.store.reader`): shard by shard, each with its entry, and the manifest from all entries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture import split
from lvm.data.store import format
from lvm.data.store.format import PAGE_SIZE, RECORD_DTYPE, SCENE_DTYPE, Scene
from lvm.data.store.reader import HEADER, MANIFEST, VERSION
from lvm.data.store.records import INDEX_SUFFIX, RECORDS_SUFFIX, file_size, read_ranges

_ABANDONED = 5.0  # seconds after which a temporary file of a process that is gone is nobody's
_OPTIONS = "group_size:1,uncompressed"
_BETWEEN_RECORDS = 2**12  # bytes that are searched for the next record; what lies between two is far less


@dataclasses.dataclass(frozen=True)
class GroupedScene:
    """A scene on its way into a store, with the name of its group (the original image or video)."""

    scene: Scene
    group: str


@dataclasses.dataclass
class SkippedItems:
    """What of a shard's slice of the source is not in the shard; grows while the slice is read.

    Attributes:
      failures: {"key", "reason"} of each.
      groups: hashes of the groups that could not be read: the split is told by all that the source has.
    """

    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)


def shard_name(shard: int, num_shards: int) -> str:
    return f"shard-{shard:05d}-of-{num_shards:05d}"


def write_shard(
    folder: epath.PathLike,
    shard: int,
    num_shards: int,
    content: Iterable[GroupedScene],
    num_codes: int,
    skipped: SkippedItems | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes one shard, its index and, last, its entry; returns the entry.

    Args:
      folder: the store.
      shard, num_shards: which one of how many.
      content: its scenes, in order.
      num_codes: size of the codebook, for the histogram.
      skipped: what isn't in the shard; looked at after `content` is exhausted.
      versions: of the software that made the codes.

    Raises:
      UserError: another process of this machine is writing the shard.
    """
    skipped, folder = skipped or SkippedItems(), epath.Path(folder)
    name = shard_name(shard, num_shards)
    with _beside(folder) as place, _alone(place / f".{name}{RECORDS_SUFFIX}.tmp"):
        temporary = {suffix: place / f".{name}{suffix}.tmp" for suffix in (RECORDS_SUFFIX, INDEX_SUFFIX)}
        try:
            with files.clear_disk_errors(temporary[RECORDS_SUFFIX]):
                written = _write_records(temporary[RECORDS_SUFFIX], content, num_codes)
            index = np.array(written.entries, SCENE_DTYPE).tobytes()
            temporary[INDEX_SUFFIX].write_bytes(
                index + _find_places(temporary[RECORDS_SUFFIX], written).tobytes()
            )
            entry = {
                "name": name,
                "scenes": len(written.entries),
                "records": len(written.records),
                "images": int(sum(written.images.values())),
                "images_by_stream_set": {str(number): n for number, n in sorted(written.images.items())},
                "group_hashes": _extremes([entry[-1] for entry in written.entries] + skipped.groups),
                "histogram": written.histogram.tolist(),
                "failures": skipped.failures,
                "versions": dict(versions or {}),
                "files": {
                    f"{name}{suffix}": {"bytes": file.stat().length, "sha256": files.sha256(file)}
                    for suffix, file in temporary.items()
                },
            }
            for suffix, file in temporary.items():
                files.put(file, folder / f"{name}{suffix}")
        finally:
            for file in temporary.values():
                file.unlink(missing_ok=True)
    files.write_json(folder / f"{name}.json", entry)
    return entry


@contextlib.contextmanager
def _beside(folder: epath.Path) -> Iterator[epath.Path]:
    """A local folder for unfinished files: the store itself where it is local."""
    if not files.is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)


@contextlib.contextmanager
def _alone(file: epath.Path) -> Iterator[None]:
    """Refuses to write what another process is writing: the one's checksum would be of the other's half."""
    lock = files.lock_file(file)
    if lock is None:
        raise UserError(f"{file}: another process is writing this shard; give each its own --shard")
    with lock:
        yield


@dataclasses.dataclass
class _Written:
    histogram: np.ndarray  # int64 [codes]
    entries: list[tuple[int, ...]] = dataclasses.field(default_factory=list)  # of the index
    images: Counter[int] = dataclasses.field(default_factory=Counter)  # by stream set, one of each stream
    records: list[tuple[bytes, int, int]] = dataclasses.field(
        default_factory=list
    )  # beginning, size, grids of each
    codes_per_image: int = 0


def _write_records(path: epath.Path, content: Iterable[GroupedScene], num_codes: int) -> _Written:
    pages: dict[int, list[GroupedScene]] = {}  # stream set → single-image scenes that wait for their page
    written = _Written(np.zeros(num_codes, np.int64))
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)

    def write(page: Sequence[GroupedScene]) -> None:
        record = format.pack([item.scene for item in page])
        writer.write(record)
        for slot, item in enumerate(page):
            scene, group = item.scene, split.group_hash(item.group)
            written.entries.append(
                (len(written.records), len(scene.codes), slot, scene.stream_set, scene.class_id, group)
            )
            written.images[scene.stream_set] += scene.codes.shape[0] * scene.codes.shape[1]
        codes = np.concatenate([item.scene.codes.ravel() for item in page])
        written.histogram += np.bincount(codes, minlength=num_codes)
        *_, written.codes_per_image = page[0].scene.codes.shape
        grids = codes.size // written.codes_per_image
        written.records.append((record[: format.RECORD_HEADER_SIZE], len(record), grids))

    for item in content:
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
    return written


def _find_places(path: epath.Path, written: _Written) -> np.ndarray:
    """Where the blocks of all records begin: `RECORD_DTYPE` [records]. Reads all of them and compares their checksums.

    Raises:
      UserError: they don't lie in the file as they were written.
    """
    places, end = np.zeros(len(written.records), RECORD_DTYPE), 0
    with open(path, "rb") as file:
        for number, (head, size, grids) in enumerate(written.records):
            ahead = _read(file, end, _BETWEEN_RECORDS).find(head)
            blocks = format.blocks_size(grids, written.codes_per_image)
            start, end = end + ahead + size - blocks, end + ahead + size
            found = format.unpack_blocks(_read(file, start, blocks), grids, written.codes_per_image)
            if ahead < 0 or found is None:
                raise UserError(
                    f"{path}: record {number} isn't there as it was written: the disk is at fault, or this "
                    "version of array_record lays files out in another way"
                )
            places[number] = start, grids
    return places


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    return read_ranges([file.fileno()], np.array([place]), np.array([size]))


def read_shard_entry(folder: epath.PathLike, shard: int, num_shards: int) -> dict[str, Any] | None:
    """A finished shard's entry, or None; also where a file that it lists is gone or has another size."""
    path = epath.Path(folder) / f"{shard_name(shard, num_shards)}.json"
    if not path.exists():
        return None
    entry = files.read_json(path)
    whole = all(file_size(path.parent / name) == listed["bytes"] for name, listed in entry["files"].items())
    return entry if whole else None


def begin_store(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> None:
    """Begins a store, or goes on with one: shards of two kinds never mix.

    Args:
      folder: the store.
      header: what the manifest says of all of it, JSON.
      num_shards: how many shards it is cut into.

    Raises:
      UserError: the folder holds something else, or codes made otherwise.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / HEADER, files.as_json({"version": VERSION, **header, "num_shards": num_shards})
    if path.exists():
        old = files.read_json(path)
        changed = [_change(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
        if listed := ", ".join(filter(None, changed)):
            raise UserError(
                f"{folder}: holds codes made otherwise (changed: {listed}); choose another --out, "
                "or what it was begun with"
            )
        return
    # A folder of gs:// is there once something is in it.
    if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty and not a store; choose a new folder for --out")
    files.write_json(path, new)


def _change(key: str, old: Any, new: Any) -> str:
    if old == new:
        return ""
    return key if isinstance(old, (dict, list)) or isinstance(new, (dict, list)) else f"{key}: {old} → {new}"


def finish_store(folder: epath.PathLike) -> list[str]:
    """Writes the manifest if all shards are there; returns the names of those that are not.

    Whoever finds all entries writes it, and writes the same: to do so again changes nothing.

    Raises:
      UserError: no store was begun in the folder, or one of another version.
    """
    folder = epath.Path(folder)
    if not (folder / HEADER).exists():
        raise UserError(f"{folder}: no store was begun there ({HEADER} is missing)")
    header = files.read_json(folder / HEADER)
    if (version := header.pop("version", None)) != VERSION:
        raise UserError(
            f"{folder / HEADER}: version {version}, this writes version {VERSION}; encode it again, into a new folder"
        )
    num_shards = header.pop("num_shards")
    missing = write_manifest(folder, header, num_shards)
    if not missing and not files.is_remote(folder):
        _remove_leftovers(folder)
    return missing


def _remove_leftovers(folder: epath.Path) -> None:
    """Removes temporary files of processes that were killed while they wrote an entry or a manifest."""
    for file in pathlib.Path(folder).glob(".*.json.*.tmp"):
        process = file.name.split(".")[-2]
        with contextlib.suppress(FileNotFoundError):
            # Those of another host are left to it for as long as they might be in use.
            if (
                time.time() - file.stat().st_mtime > _ABANDONED
                and not pathlib.Path("/proc", process).exists()
            ):
                file.unlink()


def write_manifest(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> list[str]:
    """`finish_store` with a header that is given."""
    found = [read_shard_entry(folder, shard, num_shards) for shard in range(num_shards)]
    missing = [shard_name(shard, num_shards) for shard, entry in enumerate(found) if entry is None]
    if not missing:
        files.write_json(epath.Path(folder) / MANIFEST, build_manifest(header, list(filter(None, found))))
    return missing


def build_manifest(header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of a store's header (without `num_shards`) and all of its entries."""
    sets: Counter[str] = Counter()
    for entry in entries:
        sets.update(entry["images_by_stream_set"])
    streams: Counter[str] = Counter()
    for number, images in sets.items():
        names = header["stream_sets"][int(number)]
        streams.update({name: images // len(names) for name in names})
    versions = {name: {entry["versions"].get(name) for entry in entries} for name in entries[0]["versions"]}
    totals = {
        "scenes": sum(entry["scenes"] for entry in entries),
        "images": sum(entry["images"] for entry in entries),
        "images_by_stream": dict(streams),
        "group_hashes": _extremes([hash for entry in entries for hash in entry["group_hashes"]]),
        "histogram": np.sum([entry["histogram"] for entry in entries], axis=0).tolist(),
        "versions": {name: sorted(filter(None, all_of)) for name, all_of in versions.items()},
    }
    # What is summed stays in the entries: thousands of histograms would make a manifest that is slow to open.
    summed = totals.keys() - {"scenes", "images"} | {"images_by_stream_set"}
    kept = [{key: value for key, value in entry.items() if key not in summed} for entry in entries]
    return {"version": VERSION, **header, **totals, "shards": kept}


def _extremes(hashes: Sequence[int]) -> list[int]:
    """The lowest and the highest, or none of none."""
    return [min(hashes), max(hashes)] if hashes else []
