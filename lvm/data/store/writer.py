"""Store writer (`lvm.data.store.reader`): shards, an entry after each, and the manifest from all entries.

Processes share nothing but the folder. Each shard is written without knowledge of the others; `finish_store` merges
their classes, stream sets and codecs.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt64

from lvm.common import files
from lvm.common.config import describe_changes
from lvm.common.errors import UserError
from lvm.data.store import failures, format, manifest
from lvm.data.store.failures import FAILURES_SUFFIX
from lvm.data.store.format import (
    CODES_SUFFIX,
    INDEX_SUFFIX,
    SCENE_DTYPE,
    SECTIONS,
    VERSION,
    Scene,
    shard_name,
)
from lvm.data.store.manifest import HEADER
from lvm.data.store.reader import check_version

_ABANDONED_S = 5.0  # age after which a temporary file of a process that no longer runs is removed
_ABANDONED_SHARD_S = 3600.0  # the same for files of a shard, on a file system without locks
_BUFFER = 1024  # grids


class BusyShardError(UserError):
    """Another process on this machine is writing the shard."""


@dataclasses.dataclass
class SkippedItems:
    """Items of a shard's range of the source that are not in the shard; filled while the range is read.

    Attributes:
      failures: their {"key", "reason"}.
      groups: hashes of unreadable groups: the held-out split is computed from all groups of the source.
    """

    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)


def write_shard(
    folder: epath.PathLike, shard: int, num_shards: int, scenes: Iterable[Scene], num_codes: int,
    skipped: SkippedItems | None = None, versions: Mapping[str, str] | None = None,
    codecs: Mapping[str, Any] | None = None,
    verify: Callable[[Mapping[str, Any], Callable[[str], epath.Path]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes one shard, its index and, last, its entry; returns the entry.

    Args:
      folder: the store.
      scenes: of the shard, in order.
      num_codes: codebook size, for the histogram.
      skipped: items that are not in the shard; read once `scenes` is exhausted.
      versions: of the software that made the codes.
      codecs: stream → codec as JSON, of streams whose codec the store's header lacks; read once `scenes` is exhausted.
      verify: called before the shard is complete with `Shard`'s `entry` and `locate`; an exception leaves no shard.

    Raises:
      BusyShardError: another process on this machine is writing the shard.
      UserError: a scene or the shard is too large.
    """
    skipped, folder = skipped or SkippedItems(), epath.Path(folder)
    name = shard_name(shard, num_shards)
    with contextlib.ExitStack() as stack:
        scratch = epath.Path(stack.enter_context(_scratch_folder(folder)))
        # Without locks, two processes may write a shard at once: one of them wins, and both write the same bytes.
        unique = "" if files.has_locks(scratch) else f".{uuid.uuid4().hex}"
        temporary = {suffix: scratch / f".{name}{suffix}{unique}.tmp" for suffix in (CODES_SUFFIX, INDEX_SUFFIX)}
        stack.enter_context(_lock_shard(temporary[CODES_SUFFIX]))
        for path in temporary.values():
            stack.callback(path.unlink, missing_ok=True)
        with files.clear_disk_errors(temporary[CODES_SUFFIX]), open(temporary[CODES_SUFFIX], "wb") as file:
            content = _ShardContent(file, num_codes)
            for scene in scenes:
                content.add(scene)
            contents = content.finish()
        index, sections = format.pack_sections(contents)
        temporary[INDEX_SUFFIX].write_bytes(index)
        failed = folder / f"{name}{FAILURES_SUFFIX}"
        if skipped.failures:
            temporary[FAILURES_SUFFIX] = scratch / f".{failed.name}{unique}.tmp"
            stack.callback(temporary[FAILURES_SUFFIX].unlink, missing_ok=True)
            temporary[FAILURES_SUFFIX].write_bytes(failures.to_lines(skipped.failures))
        else:
            failed.unlink(missing_ok=True)  # of an attempt that ended before its entry
        entry = {
            "name": name,
            **content.summary(skipped.groups),
            "failures": failures.count(skipped.failures),
            "streams": files.as_json(codecs or {}),
            "versions": dict(versions or {}),
            "sections": sections,
            "files": {
                f"{name}{suffix}": {"bytes": files.file_size(path), "sha256": files.sha256(path)}
                for suffix, path in temporary.items()
            },
        }
        if verify:
            verify(entry, temporary.__getitem__)
        for suffix, path in temporary.items():
            files.put(path, folder / f"{name}{suffix}")
    files.write_json(folder / f"{name}.json", entry)
    return entry


def _scratch_folder(folder: epath.Path) -> contextlib.AbstractContextManager[str]:
    """A local folder for unfinished files: the store itself if it is local."""
    return tempfile.TemporaryDirectory() if files.is_remote(folder) else contextlib.nullcontext(str(folder))


def _lock_shard(path: epath.Path) -> IO[str]:
    """Refuses a shard that another process writes: checksums would cover a mix of both."""
    lock = files.lock_file(path)
    if lock is None:
        raise BusyShardError(f"{path}: another process is writing this shard; give each process its own --shard")
    return lock


class _ShardContent:
    """Writes the grids of a shard's scenes to `file`; collects its index and the summary for its entry."""

    def __init__(self, file: BinaryIO, num_codes: int):
        self._file, self._histogram = file, np.zeros(num_codes, SECTIONS["histogram"])
        self._rows: list[tuple[int, ...]] = []  # fields of `SCENE_DTYPE`
        self._keys: list[bytes] = []
        self._marks: list[bytes] = []
        self._classes: dict[str, int] = {}  # ids, in the order of the scenes, as those of the stream sets
        self._stream_sets: dict[tuple[str, ...], int] = {}
        self._num_images = 0
        self._pending: list[np.ndarray] = []  # grids to write
        self._num_pending = 0

    def add(self, scene: Scene) -> None:
        """Appends a scene."""
        T, S, N = scene.codes.shape
        if T > format.MAX_FRAMES:
            raise UserError(f"{scene.key[:80]}: {T} frames, the limit is {format.MAX_FRAMES}")
        class_id = self._classes.setdefault(scene.class_name, len(self._classes)) if scene.class_name else -1
        stream_set = self._stream_sets.setdefault(scene.streams, len(self._stream_sets))
        if stream_set == format.MAX_STREAM_SETS:
            raise UserError(f"{self._file.name}: more than {stream_set} stream sets, the limit of a shard")
        self._rows.append((scene.group, self._num_images, class_id, T, stream_set))
        self._keys.append(scene.key.encode())
        self._marks.append(scene.marks)
        self._num_images += T * S
        self._pending.append(scene.codes.reshape(-1, N))
        self._num_pending += T * S
        if self._num_pending >= _BUFFER:
            self._write()

    def _write(self) -> None:
        grids = np.concatenate(self._pending)
        self._file.write(format.pack_grids(grids, self._num_images - len(grids)))
        self._histogram += np.bincount(grids.ravel(), minlength=len(self._histogram)).astype(np.uint64)
        self._pending, self._num_pending = [], 0

    def finish(self) -> dict[str, bytes]:
        """Writes the rest; returns the sections of the index."""
        if self._num_pending:
            self._write()
        if max(self._num_images, sum(map(len, self._keys))) > format.MAX_SIZE:
            raise UserError(f"{self._file.name}: more than {format.MAX_SIZE} grids, or bytes of keys; use more shards")
        self._scenes = np.array(self._rows, SCENE_DTYPE)
        return {
            "scenes": self._scenes.tobytes(),
            **format.join_items("key", self._keys),
            **(format.join_items("mark", self._marks) if any(self._marks) else {"mark_offsets": b"", "marks": b""}),
            "names": format.pack_names([*self._classes], [*self._stream_sets]),
            "histogram": self._histogram.tobytes(),
        }

    def summary(self, skipped_groups: Sequence[int]) -> dict[str, Any]:
        """`summarize`, after `finish`."""
        return summarize(self._scenes, [*self._classes], [*self._stream_sets], self._histogram, skipped_groups)


def summarize(
    scenes: Shaped[np.ndarray, " scenes"], classes: Sequence[str], stream_sets: Sequence[Sequence[str]],
    histogram: UInt64[np.ndarray, " codes"], skipped_groups: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """The part of a shard's entry that its index implies, for `manifest.build`; all ids are the shard's own.

    Args:
      scenes: `SCENE_DTYPE`.
      classes, stream_sets: their names, by id.
      histogram: of the codes.
      skipped_groups: hashes of groups without a scene in the shard.
    """
    groups = scenes["group"]
    frames = np.bincount(scenes["stream_set"], scenes["frames"], len(stream_sets)).astype(int).tolist()
    images = Counter[str]()
    for names, count in zip(stream_sets, frames, strict=True):
        images.update(dict.fromkeys(names, count))
    is_listed = groups < int(manifest.LISTED_SHARE * 2**64)
    heldout = np.flatnonzero(is_listed | (groups == groups.min(initial=2**64 - 1)))
    return {
        "scenes": len(scenes),
        "images": images.total(),
        "images_by_stream": dict(images),
        "classes": list(classes),
        "stream_sets": [list(names) for names in stream_sets],
        "runs": _find_runs(scenes),
        "heldout": {"groups": groups[heldout].tolist(), "scenes": heldout.tolist()},
        "codes_used": np.packbits(histogram > 0).tobytes().hex(),
        "group_hashes": manifest.extremes([*manifest.extremes(groups.tolist()), *skipped_groups]),
    }


def _find_runs(scenes: Shaped[np.ndarray, " scenes"]) -> list[list[int]]:
    """The first scene, class, frames and stream set of each run of a shard; none of more than `MAX_RUNS`."""
    kinds = scenes[["class_id", "frames", "stream_set"]]
    starts = np.flatnonzero(np.append(np.ones(min(1, len(kinds)), bool), kinds[1:] != kinds[:-1]))
    return [[i, *kinds[i].item()] for i in starts.tolist()] if len(starts) <= manifest.MAX_RUNS else []


def read_shard_entry(folder: epath.PathLike, shard: int, num_shards: int) -> dict[str, Any] | None:
    """The entry of a finished shard; None if there is none, or a file that it lists is missing or has another size."""
    folder = epath.Path(folder)
    entry = files.read_side_file(folder / f"{shard_name(shard, num_shards)}.json")
    sizes = {name: files.file_size(folder / name) for name in entry.get("files", {})}
    return entry if _is_complete(entry, sizes) else None


def missing_among(folder: epath.PathLike, shards: Sequence[int], num_shards: int) -> list[int]:
    """Those of some shards that `read_shard_entry` has no entry of."""

    def is_missing(shard: int) -> bool:
        return read_shard_entry(folder, shard, num_shards) is None

    return [i for i, missing in zip(shards, files.map_concurrently(is_missing, shards), strict=True) if missing]


def missing_shards(folder: epath.PathLike, num_shards: int) -> list[str]:
    """Names of the shards without an entry or a file, by one listing of the folder."""
    return _missing(files.sizes(folder), num_shards)


def _missing(sizes: Mapping[str, int], num_shards: int) -> list[str]:
    suffixes = (".json", CODES_SUFFIX, INDEX_SUFFIX)
    names = (shard_name(i, num_shards) for i in range(num_shards))
    return [name for name in names if not all(f"{name}{suffix}" in sizes for suffix in suffixes)]


def _is_complete(entry: Mapping[str, Any], sizes: Mapping[str, int | None]) -> bool:
    listed = entry.get("files", {})
    return bool(listed) and all(sizes.get(name) == file["bytes"] for name, file in listed.items())


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
    # The second look at the header: other processes may have begun the store while the folder was listed.
    if not path.exists() and _has_files(folder) and not path.exists():
        raise UserError(f"{folder}: not empty and not a store; choose a new folder for --out")
    if files.create(path, files.json_bytes(new)):
        return
    check_header(folder, header, num_shards)


def check_header(
    folder: epath.PathLike, header: Mapping[str, Any], num_shards: int, ignored: Sequence[str] = ()
) -> None:
    """Raises UserError unless a store's header is this one, apart from the ignored keys."""
    path, new = epath.Path(folder) / HEADER, files.as_json({"version": VERSION, **header, "num_shards": num_shards})
    old = files.read_json(path)
    check_version(path, old.get("version"))
    if "codes" not in old.get("tokenizer", {}):  # begun by an earlier version
        new.get("tokenizer", {}).pop("codes", None)
    before, after = ({key: value for key, value in header.items() if key not in ignored} for header in (old, new))
    if changes := describe_changes(before, after):
        raise UserError(
            f"{folder}: holds codes made with other settings (changed: {changes}); choose another --out, or its "
            "settings"
        )


def _has_files(folder: epath.Path) -> bool:
    # On gs:// a folder exists once it has an object.
    return folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir())


def finish_store(folder: epath.PathLike) -> list[str]:
    """Writes the manifest if all shards are finished; returns the names of those that are not.

    Any process may call it, repeatedly: the manifest depends on the shards alone.

    Raises:
      UserError: the folder has no header, or one of another version, or the store has no scene.
    """
    folder = epath.Path(folder)
    header = read_header(folder)
    missing = write_manifest(folder, header, header.pop("num_shards"))
    if not missing and not files.is_remote(folder):
        _remove_leftovers(pathlib.Path(folder))
    return missing


def read_header(folder: epath.PathLike) -> dict[str, Any]:
    """The header of a store, with its number of shards, without its version.

    Raises:
      UserError: the folder has no header, or one of another version.
    """
    path = epath.Path(folder) / HEADER
    try:
        header = files.read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a store ({HEADER} is missing)") from error
    check_version(path, header.pop("version", None))
    return header


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes temporary files of processes that were killed while writing an entry, a manifest, or without locks."""
    ages = dict.fromkeys((".*.json.*.tmp", ".manifest.*.tmp"), _ABANDONED_S)
    for suffix in (CODES_SUFFIX, INDEX_SUFFIX, FAILURES_SUFFIX):
        ages[f".*{suffix}.*.tmp"] = _ABANDONED_SHARD_S
    for file, age_s in [(file, age_s) for pattern, age_s in ages.items() for file in folder.glob(pattern)]:
        process = file.name.split(".")[-2]
        with contextlib.suppress(FileNotFoundError):
            # A process of another host can't be looked up: its recent files may still be in use.
            is_old = time.time() - file.stat().st_mtime > age_s
            if is_old and not pathlib.Path("/proc", process).exists():
                file.unlink()


def write_manifest(folder: epath.PathLike, header: Mapping[str, Any], num_shards: int) -> list[str]:
    """`finish_store` with a given header: one listing, and one read of each entry, many at once. No store is empty."""
    sizes, num_scenes = files.sizes(folder), 0
    if missing := _missing(sizes, num_shards):
        return missing

    def complete_entries() -> Iterator[dict[str, Any]]:
        nonlocal num_scenes
        for i, entry in enumerate(read_entries(folder, range(num_shards), num_shards)):
            if _is_complete(entry, sizes):
                num_scenes += entry["scenes"]
                yield entry
            else:
                missing.append(shard_name(i, num_shards))

    contents = manifest.build(folder, header, complete_entries())
    if not missing and not num_scenes:
        skipped = next(iter((*header.get("skipped", ()), *itertools.islice(failures.read(folder), 1))), None)
        reason = f" ({skipped['key']}: {skipped['reason']})" if skipped else ""
        raise UserError(f"{folder}: found no usable scene in the source{reason}")
    if not missing:
        for name, content in contents.items():
            files.write_atomically(epath.Path(folder) / name, content)
    return missing


def read_entries(folder: epath.PathLike, shards: Iterable[int], num_shards: int) -> Iterator[dict[str, Any]]:
    """Yields the shards' entries, read many at once; {} for a missing or malformed one."""
    return files.read_side_files([epath.Path(folder) / f"{shard_name(i, num_shards)}.json" for i in shards])
