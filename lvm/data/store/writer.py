"""Store writer (`lvm.data.store.reader`): shards, an entry after each, and the manifest from all entries."""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, BinaryIO

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import format
from lvm.data.store.format import BLOCK_SIZE, CODES_SUFFIX, INDEX_SUFFIX, SCENE_DTYPE, SECTIONS, VERSION, Scene
from lvm.data.store.reader import HEADER, MANIFEST, check_version

_ABANDONED_S = 5.0  # age after which a temporary file of a process that no longer runs is removed
_BUFFER = 1024  # grids; a multiple of `BLOCK_SIZE`


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
    folder: epath.PathLike, shard: int, num_shards: int, scenes: Iterable[Scene], num_codes: int,
    skipped: SkippedItems | None = None, versions: Mapping[str, str] | None = None,
    verify: Callable[[Mapping[str, Any], Callable[[str], epath.Path]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes one shard, its index and, last, its entry; returns the entry.

    Args:
      folder: the store.
      scenes: of the shard, in order.
      num_codes: codebook size, for the histogram.
      skipped: items that are not in the shard; read once `scenes` is exhausted.
      versions: of the software that made the codes.
      verify: called before the shard is complete with `Shard`'s `entry` and `locate`; an exception leaves no shard.

    Raises:
      UserError: another process on this machine is writing the shard, or a scene or the shard is too large.
    """
    skipped, folder = skipped or SkippedItems(), epath.Path(folder)
    name = shard_name(shard, num_shards)
    with contextlib.ExitStack() as stack:
        scratch = epath.Path(stack.enter_context(_scratch_folder(folder)))
        temporary = {suffix: scratch / f".{name}{suffix}.tmp" for suffix in (CODES_SUFFIX, INDEX_SUFFIX)}
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
        entry = {
            "name": name,
            **content.counts(skipped),
            "failures": skipped.failures,
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
        raise UserError(f"{path}: another process is writing this shard; give each process its own --shard")
    return lock


class _ShardContent:
    """Writes the grids of a shard's scenes to `file`; collects its index and its counts."""

    def __init__(self, file: BinaryIO, num_codes: int):
        self._file, self._histogram = file, np.zeros(num_codes, np.int64)
        self._scenes: list[tuple[int, ...]] = []  # fields of `SCENE_DTYPE`
        self._keys: list[bytes] = []
        self._marks: list[bytes] = []
        self._checksums: list[int] = []
        self._images: Counter[int] = Counter()  # by stream set
        self._num_images = 0
        self._pending: list[np.ndarray] = []  # grids to write, from the first of a block on
        self._num_pending = 0

    def add(self, scene: Scene) -> None:
        """Appends a scene."""
        T, S, N = scene.codes.shape
        if T > format.MAX_FRAMES:
            raise UserError(f"{scene.key[:80]}: {T} frames, the limit is {format.MAX_FRAMES}")
        self._scenes.append((scene.group, self._num_images, scene.class_id, T, scene.stream_set))
        self._keys.append(scene.key.encode())
        self._marks.append(scene.marks)
        self._images[scene.stream_set] += T * S
        self._num_images += T * S
        self._pending.append(scene.codes.reshape(-1, N))
        self._num_pending += T * S
        if self._num_pending >= _BUFFER:
            self._write(self._num_pending // BLOCK_SIZE * BLOCK_SIZE)

    def _write(self, count: int) -> None:
        """Writes the first `count` of the pending grids, whole blocks except at the end of the shard."""
        grids = np.concatenate(self._pending).astype("<u2", copy=False)
        content = grids[:count].tobytes()
        self._file.write(content)
        self._checksums += format.checksum_blocks(content, grids.shape[1])
        self._histogram += np.bincount(grids[:count].ravel(), minlength=len(self._histogram))
        self._pending, self._num_pending = [grids[count:]], self._num_pending - count

    def finish(self) -> dict[str, bytes]:
        """Writes the rest; returns the sections of the index."""
        if self._num_pending:
            self._write(self._num_pending)
        if max(self._num_images, sum(map(len, self._keys))) > format.MAX_SIZE:
            raise UserError(f"{self._file.name}: more than {format.MAX_SIZE} grids, or bytes of keys; use more shards")
        return {
            "scenes": np.array(self._scenes, SCENE_DTYPE).tobytes(),
            "checksums": np.array(self._checksums, SECTIONS["checksums"]).tobytes(),
            **format.join_items("key", self._keys),
            **(format.join_items("mark", self._marks) if any(self._marks) else {"mark_offsets": b"", "marks": b""}),
        }

    def counts(self, skipped: SkippedItems) -> dict[str, Any]:
        """Counts for the shard's entry."""
        return {
            "scenes": len(self._scenes),
            "images": self._num_images,
            "images_by_stream_set": {str(i): count for i, count in sorted(self._images.items())},
            "histogram": self._histogram.tolist(),
            "group_hashes": _extremes([*(group for group, *_ in self._scenes), *skipped.groups]),
        }


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
        check_version(path, old.get("version"))
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
    check_version(folder / HEADER, header.pop("version", None))
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
