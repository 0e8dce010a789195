"""The scene store: ArrayRecord shards, an index beside each, and one manifest. `lvm.data.store.writer` writes it.

    STORE/shard-00000-of-00004.array_record   records of `lvm.data.store.format`
    STORE/shard-00000-of-00004.index          `scenes.INDEX` of its scenes, `scenes.PLACES` of its records
    STORE/shard-00000-of-00004.json           the shard's entry, written after both
    STORE/header.json                         what all shards share, written before the first
    STORE/manifest.json                       written once all entries are there

A shard counts once its entry stands, the store once its manifest does. Nothing in it tells a time or a host.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture import split
from lvm.data.store.format import ENTRY_DTYPE, RECORD_DTYPE, SCENE_DTYPE, DamagedError, Scene
from lvm.data.store.records import Shards
from lvm.data.streams.codecs import Codec, codec_from_json

VERSION = 3
_PARTS = np.dtype(
    [("scene", SCENE_DTYPE), ("place", RECORD_DTYPE), ("shard", "<i4")]
)  # ENTRY in three pieces
MANIFEST, HEADER = "manifest.json", "header.json"
_KEYS = {"version", "tokenizer", "streams", "stream_sets", "classes", "group_hashes", "histogram", "shards"}


class _Indexes(Sequence[np.ndarray]):
    """The indexes of all shards, each mapped when it is asked for."""

    def __init__(self, shards: Shards):
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, shard: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, shard: Any) -> Any:
        if isinstance(shard, slice):
            return [self._shards.index(i)[0] for i in range(*shard.indices(len(self)))]
        return self._shards.index(range(len(self))[shard])[0]


class Store:
    """A finished store, read by random access. Opening it reads the manifest alone.

    It may be sent to another process, which opens it again.

    Args:
      path: its folder, local or gs://.
      stage_to: a local folder that shards are copied to, checked, when they are first asked for; "" reads them
        where they are, which must then be local.

    Attributes:
      manifest: as written.
      streams: stream name → codec.
      stream_sets: the names of the streams of each set.
      classes: class names.
      shards: their files.
      indexes: `scenes.INDEX` entries of each shard's scenes, memory-mapped when they are asked for.

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
        self._num_streams = np.array([len(names) for names in self.stream_sets], np.int64)
        streams = self._num_streams.tolist()
        self.shards = Shards(self.path, self.manifest["shards"], stage_to, self.identity, streams)
        self.indexes = _Indexes(self.shards)
        self._starts = np.cumsum([0] + [entry["scenes"] for entry in self.manifest["shards"]])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (os.fspath(self.path), self._stage_to)

    @functools.cached_property
    def index(self) -> np.ndarray:
        """`scenes.INDEX` entries of all scenes in memory, shard after shard; `entries` needs none of it."""
        return np.concatenate([np.zeros(0, SCENE_DTYPE), *self.indexes])

    def entries(self, numbers: np.ndarray) -> np.ndarray:
        """The `ENTRY_DTYPE` entries of the scenes at `numbers`, int64 [n]."""
        found = np.empty(len(numbers), _PARTS)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        order = np.argsort(shards, kind="stable")
        firsts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for mine in np.split(order, firsts[1:]) if len(order) else ():
            shard = int(shards[mine[0]])
            index, places = self.shards.index(shard)
            found["scene"][mine] = rows = index[numbers[mine] - self._starts[shard]]
            found["place"][mine] = places[rows["record"]]
        found["shard"] = shards
        return found.view(ENTRY_DTYPE)

    def grids(self, entries: np.ndarray, frames: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Single grids, of which no more is read than the blocks that they lie in: uint16 [n, N].

        Args:
          entries: `ENTRY_DTYPE` [n], the scene of each.
          frames: int64 [n], its frame.
          columns: int64 [n], its place in the scene's stream set.

        Raises:
          DamagedError: what is read is damaged; names shard and record.
        """
        before = entries["slot"] + frames  # a scene of several frames has slot 0
        places = before * self._num_streams[entries["stream_set"]] + columns  # in the record
        return self.shards.grids(entries, places, self.codes_per_image)

    @property
    def codes_per_image(self) -> int:
        height, width = self.manifest["tokenizer"]["grid"]
        return height * width

    @property
    def num_codes(self) -> int:
        return self.manifest["tokenizer"]["num_codes"]

    @functools.cache  # noqa: B019 (lives as long as its store)
    def identity(self) -> str:
        """A hash of the manifest, and so of every shard's checksum."""
        return files.sha256(self.path / MANIFEST)

    def heldout(self, fraction: float, entries: np.ndarray | None = None) -> np.ndarray:
        """bool [n]: the scenes of `entries` (default: all) that are held out by `lvm.data.mixture.split`."""
        lowest, highest = self.manifest["group_hashes"]
        groups = (self.index if entries is None else entries)["group"]
        return split.heldout_mask(groups, fraction, (lowest, highest))

    def scene(self, number: int) -> Scene:
        """The scene at `number` in [0, len).

        Raises:
          DamagedError: its record is damaged; names shard and record.
        """
        shard = self.shard_of(number)
        _, frames, slot, stream_set, *_ = entry = self.indexes[shard][number - self._starts[shard]].item()
        page = self.shards.page(shard, entry[0])
        scene = page[slot] if slot < len(page) else None
        if scene is None or (len(scene.codes), scene.stream_set) != (frames, stream_set):
            where = self.shards.where(shard, entry[0])
            raise DamagedError(f"{where}: the index beside it is damaged: it tells of another scene")
        return scene

    def shard_of(self, number: int) -> int:
        """The shard of the scene at `number`."""
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def videos(self, stream: str, min_frames: int, limit: int) -> list[np.ndarray]:
        """Codes uint16 [T, N] of a stream, of at most `limit` scenes that have it and as many frames."""
        has = np.array([stream in names for names in self.stream_sets], bool)
        numbers = np.flatnonzero(has[self.index["stream_set"]] & (self.index["frames"] >= min_frames))
        scenes = [self.scene(int(number)) for number in numbers[:limit]]
        return [scene.codes[:, self.stream_sets[scene.stream_set].index(stream)] for scene in scenes]


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise UserError(f"{path}: not a finished store ({MANIFEST} is missing); tokenizer.encode writes one")
    manifest = files.read_json(file)
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        raise UserError(f"{file}: not a store's manifest; it needs {', '.join(sorted(_KEYS))}")
    if manifest["version"] != VERSION:
        raise UserError(
            f"{file}: version {manifest['version']!r}, this reads version {VERSION}; encode it again"
        )
    return manifest
