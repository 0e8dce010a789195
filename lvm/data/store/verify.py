"""Verification of a store: every byte against its checksum, every count against the index, the manifest against both.

Shards are independent of each other: worker processes check many at once.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence

import numpy as np

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import format, manifest, writer
from lvm.data.store.failures import FAILURES_SUFFIX
from lvm.data.store.format import SECTIONS
from lvm.data.store.manifest import HEADER, MANIFEST
from lvm.data.store.reader import Store
from lvm.data.store.shards import FILE_CHECKSUM_MISMATCH, Shard, check_size

_CHUNK = 4096  # grids read at once


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """Problems of a shard, one line each, damaged codes in the words of training's errors; counts of its codes."""

    problems: list[str]
    histogram: np.ndarray


def manifest_problems(store: Store) -> Iterator[str]:
    """Builds the manifest again from the header and all shards' entries, and yields the differences."""
    num_shards = len(store.shards)
    try:
        header = files.read_json(store.path / HEADER)
        if (version := header.pop("version")) != format.VERSION:
            yield f"{store.path / HEADER}: damaged: version {version}, not {format.VERSION}"
        if (number := header.pop("num_shards")) != num_shards:
            yield f"{store.path / MANIFEST}: has {num_shards} shards, {HEADER} {number}"
        rebuilt = manifest.build(store.path, header, writer.read_entries(store.path, range(num_shards), num_shards))
    except (OSError, UserError, KeyError, IndexError, TypeError, ValueError) as error:
        yield f"{store.path}: {HEADER} or a shard's entry is missing or damaged: {error!r}"
        return
    expected = json.loads(rebuilt.pop(MANIFEST))
    for key in sorted(expected.keys() | store.manifest.keys()):
        if expected.get(key) != store.manifest.get(key):
            yield f"{store.path / MANIFEST}: damaged: {key} differs from {HEADER} and the shards' entries"
    for name, content in rebuilt.items():
        try:
            if files.read_bytes(store.path / name) != content:
                yield f"{store.path / name}: damaged: differs from {HEADER} and the shards' entries"
        except OSError as error:
            yield str(error)


def find_problems(store: Store) -> Iterator[str]:
    """Yields every problem of a store, one line each."""
    yield from manifest_problems(store)
    for report in check_shards(store, range(len(store.shards)), 0):
        yield from report.problems


def check_shards(store: Store, shards: Sequence[int], workers: int) -> Iterator[ShardReport]:
    """Yields the report of each of some shards.

    Args:
      workers: processes; 0 checks here.
    """
    if not workers:
        yield from (check_shard(store, shard) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _open_store, (store,)) as pool:
        yield from pool.map(_check_shard, shards)


_store: Store  # of a worker process


def _open_store(store: Store) -> None:
    global _store
    _store = store


def _check_shard(shard: int) -> ShardReport:
    return check_shard(_store, shard)


def check_shard(store: Store, number: int) -> ShardReport:
    """Checks the files of a shard."""
    shard, histogram = store.shards[number], np.zeros(2**16, np.int64)
    problems = list(_content_problems(store, shard, histogram))
    problems += [problem for problem in _file_problems(store, shard, bool(problems)) if problem not in problems]
    return ShardReport(problems, histogram)


def _content_problems(store: Store, shard: Shard, histogram: np.ndarray) -> Iterator[str]:
    """Compares a shard's codes with its index, and its index with its entry; counts the codes in `histogram`."""
    name, is_damaged = store.path / shard.entry["name"], False
    try:
        sections = {section: shard.section(section) for section in SECTIONS}
        for damage in _damaged_grids(shard, histogram, store.codes_per_image):
            is_damaged = True
            yield damage
        classes, stream_sets = shard.names
    except UserError as error:
        yield str(error)
        return
    scenes, offsets = sections["scenes"], sections["key_offsets"].tolist()
    if scenes["stream_set"].max(initial=0) >= max(1, len(stream_sets)):
        yield f"{name}: the index has stream set {scenes['stream_set'].max()}, its names {len(stream_sets)} sets"
        return
    images = scenes["frames"] * np.array([*map(len, stream_sets), 0], np.int64)[scenes["stream_set"]]
    if (scenes["first_grid"] != np.cumsum(images) - images).any():
        yield f"{name}: the shard's index is damaged: its scenes do not follow one another"
    keys = sections["keys"].tobytes()
    hashes = np.fromiter((hash(keys[i:j]) for i, j in itertools.pairwise(offsets)), np.int64, len(scenes))
    if duplicates := len(hashes) - len(np.unique(hashes)):
        yield f"{name}: {duplicates} duplicate keys"
    counted = sections["histogram"].astype(np.int64)
    if not is_damaged and not np.array_equal(np.trim_zeros(histogram, "b"), np.trim_zeros(counted, "b")):
        yield f"{name}: histogram differs from that of the codes"
    entry = files.read_side_file(store.path / f"{name.name}.json")
    expected = writer.summarize(scenes, classes, stream_sets, sections["histogram"])
    expected["sections"] = shard.entry["sections"]
    if entry.get("failures"):  # groups of failures are in the entry only
        del expected["group_hashes"]
    for key, value in expected.items():
        if entry.get(key, value) != value:
            yield f"{name}: the entry says {key} {str(entry[key])[:80]}, the shard has {str(value)[:80]}"


def _damaged_grids(shard: Shard, histogram: np.ndarray, codes_per_image: int) -> Iterator[str]:
    """Yields the damage of each grid; counts the codes of all in `histogram`."""
    for first in range(0, shard.num_grids, _CHUNK):
        content = shard.read(first, count := min(_CHUNK, shard.num_grids - first))
        histogram += np.bincount(content.view("<u2")[:, :codes_per_image].ravel(), minlength=len(histogram))
        damaged = format.damaged_grids(content, range(first, first + count))
        yield from (str(shard.damage(first + i)) for i in damaged)


def _file_problems(store: Store, shard: Shard, is_named: bool) -> Iterator[str]:
    """Compares a shard's files with their checksums; `is_named` if damage of their content was reported already."""
    name = shard.entry["name"]
    entry = store.path / f"{name}.json"
    listed = files.read_side_file(entry).get("files", {})
    failures = {file: expected for file, expected in listed.items() if file.endswith(FAILURES_SUFFIX)}
    if listed and {**shard.entry["files"], **failures} != listed:
        yield f"{entry}: damaged: files differ from {MANIFEST}"
    for file, expected in {**shard.entry["files"], **failures}.items():
        path = store.path / file
        try:
            check_size(path, expected)
            if files.sha256(path) != expected["sha256"]:
                note = "" if is_named or file in failures else ", but every grid is intact"
                yield f"{path}: {FILE_CHECKSUM_MISMATCH}{note}"
        except (UserError, OSError) as error:
            yield str(error)
