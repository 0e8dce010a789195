"""The images of a source's train split, for random access: files are listed when their turn comes, not before.

Nothing here grows with the number of scenes, but for open files' listings, which are on disk. What grows with the
number of files is two counts of images each, which a run's processes keep in its workdir.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import ImageSource, SceneInfo
from lvm.data.images.sources.base import Part
from lvm.data.images.sources.division import PartSpec
from lvm.data.mixture import split

POOLS = ("rgb", "others")  # images of rgb, and of all other streams
_UNIT_SCENES = 65_536  # of a unit of a source that is listed at once
_SPREAD = 8  # units that held-out images come from
_LISTED_AHEAD = 8  # threads that list, and copy from object storage
_SAVE_EVERY_S = 30.0  # between writes of counts


def pool_sizes(info: SceneInfo) -> tuple[int, int]:
    """Returns the number of a scene's images in each of `POOLS`."""
    num_rgb = info.streams.count("rgb")
    return info.num_frames * num_rgb, info.num_frames * (len(info.streams) - num_rgb)


def locate_image(info: SceneInfo, pool: int, index: int) -> tuple[int, str]:
    """Returns the frame and stream of a scene's image, by its index among those of a pool."""
    streams = [stream for stream in info.streams if (stream == "rgb") == (pool == 0)]
    frame, i = divmod(index, len(streams))
    return frame, streams[i]


def index_image(info: SceneInfo, frame: int, stream: str) -> tuple[int, int]:
    """Inverse of `locate_image`: returns the pool and the index."""
    pool = POOLS.index("rgb") if stream == "rgb" else POOLS.index("others")
    streams = [other for other in info.streams if (other == "rgb") == (stream == "rgb")]
    return pool, frame * len(streams) + streams.index(stream)


class Listing:
    """The scenes of a unit's train split, pickled in a temporary file.

    Attributes:
      ends: images of each pool up to and with each scene, int64 [2, n].
      streams: of all scenes.
    """

    def __init__(self, infos: Sequence[SceneInfo], scenes: Iterable[Any], release: Callable[[], None]):
        ends = np.cumsum([pool_sizes(info) for info in infos], 0, np.int64).reshape(-1, len(POOLS)).T
        self.ends = np.ascontiguousarray(ends)  # searching would copy each of them otherwise
        self.streams = {stream for info in infos for stream in info.streams}
        self._release, sizes = release, [0]
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (until `close`)
        for scene in scenes:
            sizes.append(self._file.write(pickle.dumps(scene)))
        self._file.flush()
        self._offsets = np.cumsum(sizes, dtype=np.int64)  # [n + 1]

    @property
    def counts(self) -> Int64[np.ndarray, "2"]:
        """The images of each pool."""
        return self.ends[:, -1] if self.ends.size else np.zeros(len(POOLS), np.int64)

    def image(self, pool: int, index: int) -> tuple[bytes, int]:
        """Returns the pickled scene of an image, and its index among the scene's images of the pool."""
        ends = self.ends[pool]
        scene = int(np.searchsorted(ends, index, side="right"))
        start, stop = self._offsets[scene : scene + 2].tolist()
        return os.pread(self._file.fileno(), stop - start, start), index - (int(ends[scene - 1]) if scene else 0)

    def close(self) -> None:
        """Frees the file, and the source's local copy."""
        self._file.close()
        self._release()


def _close(listing: concurrent.futures.Future[Listing]) -> None:
    if not listing.cancelled() and not listing.exception():
        listing.result().close()


@dataclasses.dataclass
class _Open:
    future: concurrent.futures.Future[Listing]
    users: int = 0


class Catalog:
    """Units of a source, each a file or a range of scenes, and the images of their train split.

    The split is that of `split.heldout_mask`, of the whole source: only where few units hold all groups, or all
    groups of the first units are in one split, are all of them listed for it.

    Attributes:
      streams: of the scenes that were listed.
      heldout: scenes of the held-out split, in the source's order: all, or those of some units.

    Args:
      max_scenes: only the first scenes of the train split are used; 0 for all.
      folder: where processes keep counts of images, each of its own, and read all of them at their start.
      process: of this process.

    Raises:
      UserError: no usable scene, or as `split.heldout_mask` does.
    """

    def __init__(
        self, source: ImageSource, heldout_fraction: float, max_scenes: int, folder: epath.PathLike, process: int = 0
    ):  # fmt: skip
        self._source, self._fraction, self._last_scenes = source, heldout_fraction, -1
        self._units = self._divide()
        self._lock, self._open = threading.Lock(), dict[int, _Open]()
        self._threads = concurrent.futures.ThreadPoolExecutor(_LISTED_AHEAD, "list")
        self._reported = set[int]()  # units whose skipped data is logged
        self._heldout_files, self.streams = contextlib.ExitStack(), set[str]()
        self._extremes, self.heldout = self._scan()
        if max_scenes:
            self._limit(max_scenes)
        identity = json.dumps([source.describe(), heldout_fraction, max_scenes], sort_keys=True, default=str)
        key = f"{split.content_hash(identity.encode()):016x}"
        self._path, self._saved_at = epath.Path(folder) / f"{key}-{process}.json", 0.0
        self._counts = np.full((self.num_units, len(POOLS)), -1, np.int64)
        for path in epath.Path(folder).glob(f"{key}-*.json") if epath.Path(folder).is_dir() else ():
            self._counts = np.maximum(self._counts, np.array(files.read_json(path)["counts"], np.int64))

    @property
    def num_units(self) -> int:
        """The number of units that images are taken from."""
        return len(self._units)

    def known_counts(self, pool: int, units: Sequence[int]) -> Int64[np.ndarray, " n"]:
        """Returns the units' numbers of images of a pool, -1 for one that wasn't listed yet."""
        return self._counts[list(units), pool]

    def acquire(self, unit: int) -> concurrent.futures.Future[Listing]:
        """Opens a unit, or takes part in its use, until `release`."""
        with self._lock:
            if unit not in self._open:
                self._open[unit] = _Open(self._threads.submit(self._list_and_count, unit))
            self._open[unit].users += 1
            return self._open[unit].future

    def release(self, unit: int) -> None:
        """Ends one use of a unit."""
        with self._lock:
            self._open[unit].users -= 1
            if self._open[unit].users:
                return
            future = self._open.pop(unit).future
        future.add_done_callback(_close)

    def close(self) -> None:
        """Ends listing, and keeps the counts."""
        self._threads.shutdown(cancel_futures=True)
        self._save()

    def release_heldout(self) -> None:
        """Frees the local copies of files with the scenes of `heldout`."""
        self._heldout_files.close()

    def _divide(self) -> list[PartSpec]:
        whole = self._source.plan(0, 1)
        if not self._source.is_listed:
            return whole
        size = whole[-1].stop - whole[0].start
        return [PartSpec(i, min(size, i + _UNIT_SCENES)) for i in range(0, size, _UNIT_SCENES)]

    def _scan(self) -> tuple[tuple[int, int], list[Any]]:
        """Returns the lowest and the highest hash of a group, and the held-out scenes of some units.

        Lists units over the whole source, and all others if the hashes don't tell that both splits have groups.
        """
        threshold = int(self._fraction * 2**64)
        if not threshold:
            return (0, 0), []
        spread = np.unique(np.linspace(0, self.num_units - 1, _SPREAD).astype(int)).tolist()
        lowest, highest, candidates = 2**64, -1, list[tuple[int, int, Any]]()  # (unit, hash, scene)
        for unit in [*spread, *sorted(set(range(self.num_units)) - set(spread))]:
            if unit not in spread and lowest < threshold <= highest:
                break
            part = self._source.part(self._units[unit])
            infos = [self._source.info(scene) for scene in part.scenes]
            hashes = [split.group_hash(info.group) for info in infos]
            self.streams |= {stream for info in infos for stream in info.streams}
            lowest, highest = min([lowest, *hashes]), max([highest, *hashes])
            candidates = [each for each in candidates if each[1] < threshold or each[1] == lowest]
            limit = max(threshold, lowest + 1)
            candidates += [(unit, h, s) for h, s in zip(hashes, part.scenes, strict=True) if h < limit]
            self._report(unit, part)
            self._heldout_files.callback(part.release)
        if highest < 0:
            raise UserError(f"config.data.source: {self._source.name} has no usable scene")
        mask = split.heldout_mask(np.array([h for _, h, _ in candidates], np.uint64), self._fraction, (lowest, highest))
        kept = [each for each, is_heldout in zip(candidates, mask.tolist(), strict=True) if is_heldout]
        return (lowest, highest), [scene for _, _, scene in sorted(kept, key=lambda each: each[0])]

    def _list_and_count(self, unit: int) -> Listing:
        listing = self._list(unit)
        self._note(unit, listing)
        return listing

    def _limit(self, max_scenes: int) -> None:
        for unit in range(self.num_units):
            listing = self._list(unit)
            num_scenes = listing.ends.shape[1]
            listing.close()
            if max_scenes <= num_scenes:
                self._units, self._last_scenes = self._units[: unit + 1], max_scenes
                return
            max_scenes -= num_scenes

    def _list(self, unit: int) -> Listing:
        part = self._source.part(self._units[unit])
        infos = [self._source.info(scene) for scene in part.scenes]
        selected = list(range(len(infos)))
        if infos and self._fraction:
            hashes = np.array([split.group_hash(info.group) for info in infos], np.uint64)
            selected = np.flatnonzero(~split.heldout_mask(hashes, self._fraction, self._extremes)).tolist()
        if unit == self.num_units - 1 and self._last_scenes >= 0:
            selected = selected[: self._last_scenes]
        listing = Listing([infos[i] for i in selected], (part.scenes[i] for i in selected), part.release)
        self._report(unit, part)
        return listing

    def _report(self, unit: int, part: Part) -> None:
        if unit not in self._reported:
            self._reported.add(unit)
            for failure in part.skipped:
                log_info(f"skipped {failure.key}: {failure.reason}")

    def _note(self, unit: int, listing: Listing) -> None:
        with self._lock:
            self.streams = self.streams | listing.streams
            if (self._counts[unit] == listing.counts).all():
                return
            self._counts[unit] = listing.counts
            if time.monotonic() < self._saved_at + _SAVE_EVERY_S:
                return
            self._saved_at = time.monotonic()
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self._path, {"counts": self._counts.tolist()})
