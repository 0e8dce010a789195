"""Encodes an image source into the shards of a store: images from worker processes, codes from the devices.

Each shard holds consecutive files of the source, or scenes (`SceneSource.plan`), which are listed when it is encoded.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import PIL.features
from etils import epath
from jaxtyping import Array, UInt8, UInt16

import lvm
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.augment import Augment
from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decode_worker import Limits
from lvm.data.images.decoding import Decoded, DecodedScene
from lvm.data.images.sources import CodeSource, Failure, ImageSource, SceneInfo
from lvm.data.images.sources.base import Part
from lvm.data.mixture import split
from lvm.data.store import writer
from lvm.data.store.format import Scene
from lvm.data.store.shard_queue import ShardQueue
from lvm.data.store.writer import BusyShardError, SkippedItems
from tokenizer.encoding_progress import EncodingProgress
from tokenizer.pretrained import Tokenizer
from tokenizer.scene_stream import list_parts, load_scenes

ShardScenes = tuple[int, Iterator[Scene], SkippedItems]  # shard, its scenes, what it skips

_SOFTWARE = ("jax", "jaxlib", "numpy", "pillow", "av")
_MAX_PENDING = 2  # batches on the devices while the host prepares the next


@dataclasses.dataclass
class _Batch:
    """A batch of images of one shard, on the devices."""

    shard: int
    scenes: list[DecodedScene]  # decoded since the previous batch; their images may continue in the next
    codes: UInt16[Array, "B N"] | None  # None without images
    count: int  # images; the rest is padding


class ShardWriter(abc.ABC):
    """Writes the missing shards of a store of a source.

    Args:
      tokenizer: identity of the tokenizer, for the manifest.
      num_shards: also an attribute.
    """

    def __init__(
        self, tokenizer: Mapping[str, Any], source: ImageSource | CodeSource, folder: epath.PathLike, num_shards: int
    ):  # fmt: skip
        self._identity, self.num_shards, self._folder = tokenizer, num_shards, epath.Path(folder)
        self._listing = source

    def header(self) -> dict[str, Any]:
        """Metadata of all shards, known before anything is encoded."""
        return {
            "tokenizer": self._identity,
            "source": self._listing.describe(),
            "skipped": [dataclasses.asdict(failure) for failure in self._listing.skipped_files],
            "streams": self._codecs(self._listing.streams if self._listing.is_listed else ()),
        }

    def _codecs(self, streams: Iterable[str]) -> dict[str, Any]:
        return {name: codec.to_json() for name, codec in self._listing.codecs(streams).items()}

    def run(self, process: int = 0, num_processes: int = 1) -> None:
        """Writes the missing shards of the contiguous group `process` of `num_processes`.

        Raises:
          UserError: the folder holds something else, or a store with another header.
        """
        writer.begin_store(self._folder, self.header(), self.num_shards)
        first, end = (self.num_shards * i // num_processes for i in (process, process + 1))
        missing = writer.missing_among(self._folder, range(first, end), self.num_shards)
        if len(missing) < end - first:
            log_info(f"{end - first - len(missing)} of {end - first} shards exist already")
        progress = EncodingProgress()
        progress.expect(sum(len(self._listing.plan(shard, self.num_shards)) for shard in missing))
        self._write(missing, progress)

    def run_queue(self, queue: ShardQueue) -> None:
        """Writes shards that no other process writes until the store is complete.

        Raises:
          UserError: the folder holds something else, or a store with another header.
        """
        writer.begin_store(self._folder, self.header(), self.num_shards)
        progress = EncodingProgress()
        for shards in queue.passes():
            self._write(shards, progress, queue)

    def _write(self, shards: Iterable[int], progress: EncodingProgress, queue: ShardQueue | None = None) -> None:
        """Writes shards; images of the next one are read before the codes of one are complete."""
        num_codes, versions = self._identity["num_codes"], software_versions()
        with contextlib.closing(self._shards(shards, progress)) as written:  # also ends its worker processes
            for shard, scenes, skipped in written:
                codecs: dict[str, Any] = {}
                scenes = self._note_codecs(scenes, codecs)
                try:
                    writer.write_shard(
                        self._folder, shard, self.num_shards, scenes, num_codes, skipped, versions, codecs
                    )
                except BusyShardError as error:
                    if not queue:
                        raise
                    log_info(str(error))
                    queue.postpone(shard)
                    continue
                if queue:
                    queue.complete(shard)
                for failure in skipped.failures:
                    log_info(f"skipped {failure['key']}: {failure['reason']}")
                log_info(f"shard {shard + 1}/{self.num_shards}: {progress.line()}")

    def _note_codecs(self, scenes: Iterator[Scene], codecs: dict[str, Any]) -> Iterator[Scene]:
        """Yields the scenes, then adds the codecs that the header lacks to `codecs`."""
        streams: set[str] = set()
        for scene in scenes:
            streams.update(scene.streams)
            yield scene
        codecs.update(self._codecs(() if self._listing.is_listed else streams))

    @abc.abstractmethod
    def _shards(self, shards: Iterable[int], progress: EncodingProgress) -> Generator[ShardScenes]:
        """Yields the scenes of each shard; each iterator is exhausted before the next, and fills its `SkippedItems`."""

    def _store_scene(
        self, info: SceneInfo, failures: Iterable[Failure], codes: np.ndarray, skipped: SkippedItems
    ) -> Iterator[Scene]:
        """Yields the scene of codes [images, N] or [T, S, N] unless it is empty; records its failures."""
        skipped.failures += map(dataclasses.asdict, failures)
        if not len(codes):
            skipped.groups.append(split.group_hash(info.group))
            return
        grids = codes.reshape(info.num_frames, len(info.streams), -1)  # [T, S, N]
        yield Scene(info.key, info.class_name, tuple(info.streams), grids, split.group_hash(info.group))


class CodeCopier(ShardWriter):
    """Copies scenes that are codes already; the tokenizer that made them is None if unknown.

    Raises:
      UserError: the tokenizer has another grid or codebook size.
    """

    def __init__(self, tokenizer: Tokenizer | None, source: CodeSource, folder: epath.PathLike, num_shards: int):
        form = {"grid": list(source.grid), "num_codes": source.num_codes}
        identity = tokenizer.identity() if tokenizer else {"weights": "", "hash": "", **form}
        different = [f"{key} {form[key]}, not {identity[key]}" for key in form if identity[key] != form[key]]
        if different:
            raise UserError(f"--tokenizer: did not make the codes of the source: {'; '.join(different)}")
        super().__init__(identity, source, folder, num_shards)
        self._source = source

    def _shards(self, shards: Iterable[int], progress: EncodingProgress) -> Generator[ShardScenes]:
        with contextlib.closing(list_parts(self._source, shards, self.num_shards, progress)) as parts:
            for shard, of_shard in itertools.groupby(parts, key=lambda listed: listed[0]):
                skipped = SkippedItems()
                yield shard, self._copy(of_shard, skipped, progress), skipped

    def _copy(
        self, parts: Iterator[tuple[int, Part]], skipped: SkippedItems, progress: EncodingProgress
    ) -> Iterator[Scene]:
        for _, part in parts:
            skipped.failures += map(dataclasses.asdict, part.skipped)
            for scene in progress.timed("host", map(self._source.load_codes, part.scenes)):
                progress.add(scene.codes.shape[0] * scene.codes.shape[1], 1)
                yield from self._store_scene(scene.info, scene.failures, scene.codes, skipped)
            part.release()


class Encoder(ShardWriter):
    """Encodes scenes of images.

    Args:
      source: opened with `augment.source_preprocess`.
      batch_size: images per device and call; the last call of a shard is padded.
      augment: copies of each scene.
      workers: processes that read and decode; 0 uses threads of this one.
      limits: time and memory of a worker. Scenes that exceed them, or end their worker, are listed as failures.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: ImageSource, folder: epath.PathLike, num_shards: int,
        batch_size: int, augment: Augment, workers: int, limits: Limits,
    ):  # fmt: skip
        super().__init__(tokenizer.identity(), source, folder, num_shards)
        self._tokenizer, self._source, self._batch_size = tokenizer, source, batch_size
        self._augment, self._workers, self._limits = augment, workers, limits

    def header(self) -> dict[str, Any]:
        """See `ShardWriter.header`; adds how the codes are computed."""
        return super().header() | {
            "dtype": self._tokenizer.config.compute_dtype,
            "device_kind": jax.local_devices()[0].device_kind,
            "batch_size": self._batch_size,
            "augment": self._augment.copies,
        }

    def _shards(self, shards: Iterable[int], progress: EncodingProgress) -> Generator[ShardScenes]:
        failures = collections.defaultdict[int, list[Failure]](list)  # of listing, by shard
        with (
            contextlib.closing(list_parts(self._source, shards, self.num_shards, progress)) as parts,
            DecodePool(self._workers, self._limits) as pool,
        ):
            skip = lambda shard, skipped: failures[shard].extend(skipped)  # noqa: E731
            loaded = load_scenes(pool, self._source, self._augment, parts, skip)
            batches = self._encode(progress.timed("host", loaded))
            for shard, of_shard in itertools.groupby(batches, key=lambda batch: batch.shard):
                skipped = SkippedItems()
                yield shard, self._collect(of_shard, skipped, progress, failures), skipped

    def _encode(self, decoded: Iterator[tuple[Chunk, list[Decoded]]]) -> Iterator[_Batch]:
        """Yields batches in order, each once `_MAX_PENDING` more are on the devices, across the ends of shards."""
        pending: collections.deque[_Batch] = collections.deque()
        for shard, of_shard in itertools.groupby(decoded, key=lambda loaded: loaded[0].group):
            scenes_of_shard = (scene for _, results in of_shard for decoded in results for scene in decoded)
            for images, count, scenes in self._full_batches(scenes_of_shard):
                codes = self._tokenizer.encode_async(images) if count else None
                if codes is not None:
                    codes.copy_to_host_async()
                pending.append(_Batch(shard, scenes, codes, count))
                if len(pending) > _MAX_PENDING:
                    yield pending.popleft()
        yield from pending

    def _full_batches(
        self, decoded: Iterator[tuple[DecodedScene, UInt8[np.ndarray, "n R R 3"]]]
    ) -> Iterator[tuple[UInt8[np.ndarray, "B R R 3"], int, list[DecodedScene]]]:
        """Yields padded batches of a shard, at least one, their number of images, and the scenes decoded since."""
        size, R = self._batch_size * self._tokenizer.num_devices, self._augment.preprocess.resolution
        batch, count = np.zeros((size, R, R, 3), np.uint8), 0
        scenes: list[DecodedScene] = []
        is_first = True
        for scene, images in decoded:
            scenes.append(scene)
            while len(images):
                taken = min(size - count, len(images))
                batch[count : count + taken] = images[:taken]
                images, count = images[taken:], count + taken
                if count == size:
                    yield batch, count, scenes
                    # JAX may keep its argument beyond the call: the next batch needs memory of its own.
                    batch, count, scenes, is_first = np.zeros_like(batch), 0, [], False
        if count or scenes or is_first:  # a shard may have no scenes
            yield batch, count, scenes

    def _collect(
        self, batches: Iterator[_Batch], skipped: SkippedItems, progress: EncodingProgress,
        failures: dict[int, list[Failure]],
    ) -> Iterator[Scene]:  # fmt: skip
        """Yields the scenes of one shard as their last codes arrive from the devices."""
        shard = -1
        waiting: collections.deque[DecodedScene] = collections.deque()
        ready = np.zeros((0, self._tokenizer.codes_per_image), np.uint16)  # [images, N]
        for batch in batches:
            shard = batch.shard
            waiting += batch.scenes
            if batch.codes is not None:
                with progress.waiting("device"):
                    ready = np.concatenate([ready, np.asarray(batch.codes)[: batch.count]])
            progress.add(batch.count, sum(scene.is_last for scene in batch.scenes))
            while waiting and len(ready) >= waiting[0].num_images:
                scene = waiting.popleft()
                codes, ready = ready[: scene.num_images], ready[scene.num_images :]
                yield from self._store_scene(scene.info, scene.failures, codes, skipped)
        skipped.failures[:0] = map(dataclasses.asdict, failures.pop(shard))


def software_versions() -> dict[str, str]:
    """Versions of the software that images and codes depend on; libjpeg-turbo is the one in Pillow."""
    versions = {"lvm": lvm.__version__}
    for name in _SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"libjpeg_turbo": PIL.features.version("libjpeg_turbo") or ""}
