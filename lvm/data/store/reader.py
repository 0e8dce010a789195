"""Scene store: flat shards, an index beside each, and one manifest. `lvm.data.store.writer` writes it.

    STORE/shard-00000-of-00004.codes   the grids of its scenes (`lvm.data.store.format`)
    STORE/shard-00000-of-00004.index   its scenes, keys, marks, names and histogram
    STORE/shard-00000-of-00004.failures.jsonl   items of the source that it lacks, if any
    STORE/shard-00000-of-00004.json    the shard's entry, written after its other files
    STORE/header.json                  metadata of all shards, written before the first
    STORE/manifest.*                   header and totals, tables (`lvm.data.store.manifest`), once all entries exist

A shard is complete once its entry exists, a store once its manifest does. No file has a time or a host name in it.
"""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int64, Shaped, UInt16, UInt64

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture.split import heldout_mask
from lvm.data.store import manifest
from lvm.data.store.format import ENTRY_DTYPE, KIND_DTYPE, SCENE_DTYPE, VERSION, Scene
from lvm.data.store.grid_reads import GridReads, read_intact
from lvm.data.store.manifest import MANIFEST, ShardEntries
from lvm.data.store.shards import Shards, StoreIds
from lvm.data.streams.codecs import Codec, codec_from_json

_INDEXES_AT_ONCE = 512
_NESTED_ENTRY = np.dtype([("scene", SCENE_DTYPE), ("shard", "<i4")])  # as ENTRY_DTYPE
_KEYS = {"version", "tokenizer", "streams", "stream_sets", "classes", "group_hashes", "sections", "files"}


class Store:
    """Random access to a finished store. Opening it reads manifest.json and manifest.index; pickling it reopens it.

    Args:
      path: its folder, local or gs://.
      stage_to: local folder that whole shards are copied to, and checked, on first use; "" reads grids in place.

    Attributes:
      manifest: manifest.json.
      streams: stream name → codec.
      stream_sets: names of the streams of each set.
      classes: class names.
      group_hashes: the lowest and the highest of all scenes, for the split.
      runs: `manifest.RUN_DTYPE`, the kinds of the scenes of all shards that have few.
      shards: their files.

    Raises:
      UserError: not a store, or another version.
    """

    def __init__(self, path: epath.PathLike, stage_to: str = ""):
        self.path, self._stage_to = epath.Path(path), stage_to
        self.manifest = _read_manifest(self.path)
        self.streams: dict[str, Codec] = {
            name: codec_from_json(codec) for name, codec in self.manifest["streams"].items()
        }
        self.stream_sets = [tuple(names) for names in self.manifest["stream_sets"]]
        self.classes: list[str] = self.manifest["classes"]
        self.group_hashes: tuple[int, int] = tuple(self.manifest["group_hashes"])
        self._num_streams = np.array([len(names) for names in self.stream_sets], np.int64)
        tables = manifest.read_tables(self.path, self.manifest)
        self.runs = tables.runs
        entries = ShardEntries(tables.shards, self.codes_per_image)
        ids = StoreIds(*({name: i for i, name in enumerate(names)} for names in (self.classes, self.stream_sets)))
        self.shards = Shards(self.path, entries, stage_to, self.identity, self.codes_per_image, ids)
        self._starts = np.append(0, np.cumsum(tables.shards["scenes"], dtype=np.int64))
        self._first_scenes = self._starts.tolist()  # for single look-ups

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (os.fspath(self.path), self._stage_to)

    @property
    def indexes(self) -> Iterator[Shaped[np.ndarray, " scenes"]]:
        """`SCENE_DTYPE` of each shard's scenes; from object storage, many shards at once."""
        for number, shard in enumerate(self.shards):
            if number % _INDEXES_AT_ONCE == 0:
                numbers = range(number, min(number + _INDEXES_AT_ONCE, len(self.shards)))
                self.shards.load_sections(numbers, ("names", "scenes"))
            yield shard.scenes()

    @functools.cached_property
    def index(self) -> Shaped[np.ndarray, " scenes"]:
        """`SCENE_DTYPE` of all scenes in memory, shard after shard; `entries` doesn't need it."""
        return np.concatenate([np.zeros(0, SCENE_DTYPE), *self.indexes])

    @functools.cached_property
    def kinds(self) -> Shaped[np.ndarray, " runs"] | None:
        """`KIND_DTYPE` of all scenes in order, without a look at an index; None if a shard has too many runs."""
        if len(np.unique(self.runs["shard"])) < np.count_nonzero(np.diff(self._starts)):
            return None
        kinds = np.zeros(len(self.runs), KIND_DTYPE)
        for name in ("class_id", "frames", "stream_set"):
            kinds[name] = self.runs[name]
        kinds["first"] = self._starts[self.runs["shard"]] + self.runs["first_scene"]
        kinds["count"] = np.diff(kinds["first"], append=len(self))
        return kinds

    def heldout_scenes(
        self, fraction: float, extremes: tuple[int, int] | None = None
    ) -> Int64[np.ndarray, " scenes"] | None:
        """The scenes that `heldout_mask` selects, ascending, without a look at an index; None if only indexes tell."""
        if not fraction or not len(self):
            return np.zeros(0, np.int64)
        lowest, highest = extremes or self.group_hashes
        if lowest < int(fraction * 2**64) <= highest and fraction > manifest.LISTED_SHARE:
            return None
        mask = heldout_mask(self.heldout["group"], fraction, (lowest, highest))
        return np.sort(self.heldout["scene"][mask].astype(np.int64))

    def entries(self, scenes: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        """Looks up scenes, in [0, len): `ENTRY_DTYPE`. Their groups are 0 if `kinds` tells the rest."""
        if self.kinds is None:
            return self._indexed_entries(scenes)
        entries = np.zeros(len(scenes), _NESTED_ENTRY)
        entries["shard"] = np.searchsorted(self._starts, scenes, side="right") - 1
        runs = np.searchsorted(self.kinds["first"], scenes, side="right") - 1
        for name in ("class_id", "frames", "stream_set"):
            entries["scene"][name] = self.kinds[name][runs]
        first_grids, num_grids = self._run_grids
        entries["scene"]["first_grid"] = first_grids[runs] + (scenes - self.kinds["first"][runs]) * num_grids[runs]
        return entries.view(ENTRY_DTYPE)

    def groups(self, scenes: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """Group hashes of scenes, in [0, len): from the manifest, or the indexes of the shards that it doesn't list."""
        groups = np.zeros(len(scenes), np.uint64)
        listed = self.heldout[np.argsort(self.heldout["scene"])]
        at = np.minimum(np.searchsorted(listed["scene"], scenes), max(0, len(listed) - 1))
        is_listed = listed["scene"][at] == scenes if len(listed) else np.zeros(len(scenes), bool)
        groups[is_listed] = listed["group"][at[is_listed]]
        shards = np.unique(np.searchsorted(self._starts, scenes[~is_listed], side="right") - 1)
        self.shards.load_sections(shards.tolist(), ("names", "scenes"))
        groups[~is_listed] = self._indexed_entries(scenes[~is_listed])["group"]
        return groups

    def _indexed_entries(self, scenes: np.ndarray) -> np.ndarray:
        entries = np.zeros(len(scenes), _NESTED_ENTRY)
        shards = np.searchsorted(self._starts, scenes, side="right") - 1
        entries["shard"] = shards
        order = np.argsort(shards, kind="stable")
        shard_starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for rows in np.split(order, shard_starts[1:]) if len(order) else ():
            shard = int(shards[rows[0]])
            entries["scene"][rows] = self.shards[shard].scenes(scenes[rows] - self._starts[shard])
        return entries.view(ENTRY_DTYPE)

    @functools.cached_property
    def _run_grids(self) -> tuple[np.ndarray, np.ndarray]:
        """The first grid of each of `kinds` in its shard, and the grids of each of its scenes."""
        assert self.kinds is not None
        num_grids = self.kinds["frames"] * self._num_streams[self.kinds["stream_set"]]
        ends = np.cumsum(num_grids * self.kinds["count"])
        before = ends - num_grids * self.kinds["count"]  # in the store
        is_first = self.runs["first_scene"] == 0
        return before - before[is_first][np.cumsum(is_first) - 1], num_grids

    def grids(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> UInt16[np.ndarray, "n N"]:
        """Reads single grids, and no more of the shards.

        Args:
          entries: `ENTRY_DTYPE`, the scene of each grid.
          frames: its frame.
          streams: index of its stream in the scene's stream set.

        Raises:
          DamagedError: a grid is corrupted; names its shard, scene and frame.
        """
        return read_intact(self.reads(entries, frames, streams))

    def reads(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> GridReads:
        """The reads of single grids, to be done with others; arguments are those of `grids`."""
        num_streams = self._num_streams[entries["stream_set"]]
        if (beyond := (frames >= entries["frames"]) | (streams >= num_streams)).any():
            i = int(np.argmax(beyond))
            raise ValueError(f"frame {frames[i]}, stream {streams[i]} is not in a scene of {entries[i]}")
        grids = entries["first_grid"] + frames * num_streams + streams
        return GridReads(self.shards, entries["shard"], grids, self.codes_per_image)

    @property
    def codes_per_image(self) -> int:
        height, width = self.manifest["tokenizer"]["grid"]
        return height * width

    @property
    def num_codes(self) -> int:
        return self.manifest["tokenizer"]["num_codes"]

    @functools.cache  # noqa: B019 (lives as long as its store)
    def identity(self) -> str:
        """Hash of manifest.json, which has those of the tables, and so of every shard's checksum."""
        return files.sha256(self.path / MANIFEST)

    def scene(self, i: int) -> Scene:
        """Reads scene `i`, in [0, len).

        Raises:
          DamagedError: a grid is corrupted; names its shard, scene and frame.
        """
        shard = self.shard_of(i)
        return self.shards[shard].scene(i - self._first_scenes[shard])

    def shard_of(self, i: int) -> int:
        """The shard of scene `i`."""
        return bisect.bisect_right(self._first_scenes, i) - 1

    def videos(self, stream: str, min_frames: int, limit: int) -> list[UInt16[np.ndarray, "T N"]]:
        """Codes of `stream` of the first `limit` scenes that have it and at least `min_frames` frames."""
        has_stream = np.array([stream in names for names in self.stream_sets], bool)
        mask = has_stream[self.index["stream_set"]] & (self.index["frames"] >= min_frames)
        scenes = [self.scene(i) for i in np.flatnonzero(mask)[:limit].tolist()]
        return [scene.codes[:, scene.streams.index(stream)] for scene in scenes]

    @functools.cached_property
    def heldout(self) -> Shaped[np.ndarray, " scenes"]:
        """`manifest.HELDOUT_DTYPE`, by group: the scenes that any held-out share up to `LISTED_SHARE` selects."""
        return manifest.read_heldout(self.path, self.manifest)


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST
    try:
        content = files.read_json(manifest_path)
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"not a finished store ({MANIFEST} is missing)" if path.exists() else "doesn't exist"
        raise UserError(f"{path}: {problem}; tokenizer.encode writes a store") from error
    if isinstance(content, dict) and "version" in content:
        check_version(manifest_path, content["version"])
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise UserError(f"{manifest_path}: not a store's manifest; it needs {', '.join(sorted(_KEYS))}")
    return content


def check_version(path: epath.Path, version: Any) -> None:
    """Raises UserError unless a store's file has the current version."""
    if version != VERSION:
        remedy = f"convert it: lvm convert-store {path.parent} NEW" if version == 3 else "encode it again"
        raise UserError(f"{path}: version {version!r}, expected {VERSION}; {remedy}")
