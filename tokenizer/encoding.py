"""Slices of a source into shards of a store: images from worker processes, codes from the devices."""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import PIL.features
from etils import epath

from lvm.common.errors import UserError
from lvm.common.logging import duration, log_info
from lvm.data.images.augment import Augment
from lvm.data.images.batches import DecodedScene, ImageBatcher
from lvm.data.images.sources import CodeSource, ImageSource, SceneInfo
from lvm.data.mixture import loader, split
from lvm.data.store import writer
from lvm.data.store.format import Scene
from lvm.data.store.writer import GroupedScene, SkippedItems
from tokenizer.pretrained import Tokenizer

T = TypeVar("T")
Slices = Sequence[tuple[int, int]]  # first and last scene of each

_SOFTWARE = ("jax", "jaxlib", "numpy", "pillow", "av", "array_record")
_AHEAD = 2  # device calls under way while the host prepares the next
_SAY_EVERY = 10.0  # seconds


@dataclasses.dataclass
class _Call:
    """A batch on its way through the devices.

    Attributes:
      shard: that all of its images belong to.
      scenes: those that begin with it, and those without images that came before the next that has some.
      codes: uint16 [batch, N] on the devices; None where the shard's last scenes have no images.
      count: images in it; the rest is padding.
    """

    shard: int
    scenes: list[DecodedScene]
    codes: jax.Array | None
    count: int


class ShardWriter(abc.ABC):
    """Turns slices of a source into shards, those that are missing.

    Args:
      tokenizer: the codes' meaning, as a manifest has it.
      source: the scenes.
      folder: the store.
      num_shards: how many shards the source is cut into; also an attribute.

    Raises:
      UserError: the scenes have more sets of streams than a store can tell.
    """

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        source: ImageSource | CodeSource,
        folder: epath.PathLike,
        num_shards: int,
    ):
        self._identity, self.num_shards, self._folder = tokenizer, num_shards, epath.Path(folder)
        self._listing = source
        self._classes = {name: number for number, name in enumerate(source.classes)}
        self._stream_sets = {names: number for number, names in enumerate(source.stream_sets)}
        if len(self._stream_sets) > 256:
            raise UserError(
                f"{source.name}: {len(self._stream_sets)} sets of streams; a store has at most 256"
            )

    def header(self) -> dict[str, Any]:
        """What the manifest says of the whole store, known before anything is encoded."""
        return {
            "tokenizer": self._identity,
            "source": self._listing.describe(),
            "skipped": [{"key": item.key, "reason": item.reason} for item in self._listing.skipped],
            "streams": {name: codec.to_json() for name, codec in self._listing.streams.items()},
            "stream_sets": [list(names) for names in self._listing.stream_sets],
            "classes": list(self._listing.classes),
        }

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Writes the shards of a part that are missing. Several processes each do one of `parts`.

        Raises:
          UserError: the folder holds something else, or codes made otherwise.
        """
        writer.begin_store(self._folder, self.header(), self.num_shards)
        mine = range(part, self.num_shards, parts)
        missing = [s for s in mine if writer.read_shard_entry(self._folder, s, self.num_shards) is None]
        if len(missing) < len(mine):
            log_info(f"{len(mine) - len(missing)} of {len(mine)} shards are there already")
        slices = [self._slice(shard) for shard in missing]
        meter = EncodingProgress(sum(last - first for first, last in slices))
        for place, scenes, skipped in self._contents(slices, meter) if missing else ():
            num_codes = self._identity["num_codes"]
            writer.write_shard(
                self._folder, missing[place], self.num_shards, scenes, num_codes, skipped, software_versions()
            )
            for failure in skipped.failures:
                log_info(f"skipped {failure['key']}: {failure['reason']}")
            log_info(f"shard {missing[place] + 1}/{self.num_shards}: {meter.line()}")

    @abc.abstractmethod
    def _contents(
        self, slices: Slices, meter: EncodingProgress
    ) -> Iterator[tuple[int, Iterator[GroupedScene], SkippedItems]]:
        """The scenes of each slice, to be exhausted before the next is asked for; fills `SkippedItems`."""

    def _slice(self, shard: int) -> tuple[int, int]:
        scenes, shards = len(self._listing), self.num_shards
        return scenes * shard // shards, scenes * (shard + 1) // shards

    def _scene(self, info: SceneInfo, codes: np.ndarray) -> GroupedScene:
        class_id = self._classes.get(info.class_name, -1)
        grids = codes.reshape(info.num_frames, len(info.streams), -1)  # [T, S, N]
        return GroupedScene(Scene(info.key, class_id, self._stream_sets[info.streams], grids), info.group)


class CodeCopier(ShardWriter):
    """Copies scenes of ready codes into a store.

    Args:
      tokenizer: what made the codes; None where that isn't known.
      source, folder, num_shards: as `ShardWriter` has them.

    Raises:
      UserError: the tokenizer's codes are of another form.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, source: CodeSource, folder: epath.PathLike, num_shards: int
    ):
        form = {"grid": list(source.grid), "num_codes": source.num_codes}
        identity = tokenizer.identity() if tokenizer else {"weights": "", "hash": "", **form}
        if wrong := [f"{key} {form[key]}, not {identity[key]}" for key in form if identity[key] != form[key]]:
            raise UserError(f"--tokenizer: is not what made the codes of the source: {'; '.join(wrong)}")
        super().__init__(identity, source, folder, num_shards)
        self._source = source

    def _contents(
        self, slices: Slices, meter: EncodingProgress
    ) -> Iterator[tuple[int, Iterator[GroupedScene], SkippedItems]]:
        for place, (first, last) in enumerate(slices):
            skipped = SkippedItems()
            yield place, self._copied(first, last, skipped, meter), skipped

    def _copied(
        self, first: int, last: int, skipped: SkippedItems, meter: EncodingProgress
    ) -> Iterator[GroupedScene]:
        for index in range(first, last):
            with meter.waiting("host"):
                found = self._source.load_codes(index)
            skipped.failures += [{"key": item.key, "reason": item.reason} for item in found.failures]
            meter.add(found.codes.shape[0] * found.codes.shape[1], 1)
            if len(found.codes):
                yield self._scene(found.info, found.codes)
            else:
                skipped.groups.append(split.group_hash(found.info.group))


class Encoder(ShardWriter):
    """Encodes scenes of images into a store.

    Args:
      tokenizer: the codes' meaning.
      source: the scenes, by `augment.source_preprocess`.
      folder, num_shards: as `ShardWriter` has them.
      batch_size: images a device in each call; always full, the last one of a shard padded.
      augment: copies of each scene.
      workers: processes that read and decode; 0 does so in threads of this one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: ImageSource,
        folder: epath.PathLike,
        num_shards: int,
        batch_size: int,
        augment: Augment,
        workers: int,
    ):
        super().__init__(tokenizer.identity(), source, folder, num_shards)
        self._tokenizer, self._source, self._batch_size = tokenizer, source, batch_size
        self._augment, self._workers = augment, workers

    def header(self) -> dict[str, Any]:
        """See `ShardWriter.header`; and how the codes are made."""
        return super().header() | {
            "dtype": self._tokenizer.config.compute_dtype,
            "device_kind": jax.local_devices()[0].device_kind,
            "batch_size": self._batch_size,
            "augment": self._augment.copies,
        }

    def _contents(
        self, slices: Slices, meter: EncodingProgress
    ) -> Iterator[tuple[int, Iterator[GroupedScene], SkippedItems]]:
        chunks = ImageBatcher(self._source, slices, self._augment)
        for place, calls in itertools.groupby(self._calls(chunks, meter), key=lambda call: call.shard):
            skipped = SkippedItems()
            yield place, self._scenes(calls, skipped, meter), skipped

    def _calls(self, chunks: ImageBatcher, meter: EncodingProgress) -> Iterator[_Call]:
        """All batches in order, each handed out when others are under way behind it, over the ends of shards too."""
        waiting: collections.deque[_Call] = collections.deque()
        read = meter.waiting_for_each(iter(loader.prefetch_batches(chunks, 0, len(chunks), self._workers)))
        for place, parts in itertools.groupby(read, key=lambda chunk: int(chunk["range"])):
            for images, count, scenes in self._batched(parts):
                codes = self._tokenizer.encode_async(images) if count else None
                if codes is not None:
                    codes.copy_to_host_async()
                waiting.append(_Call(place, scenes, codes, count))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
        yield from waiting

    def _batched(self, chunks: Iterator[Any]) -> Iterator[tuple[np.ndarray, int, list[DecodedScene]]]:
        """Batches uint8 [B, R, R, 3] of one shard's images: how many there are, and the scenes up to there."""
        size, R = self._batch_size * self._tokenizer.num_devices, self._augment.preprocess.resolution
        batch, count = np.zeros((size, R, R, 3), np.uint8), 0
        scenes: list[DecodedScene] = []
        for chunk in chunks:
            scenes += chunk["scenes"].tolist()
            images = chunk["images"]
            while len(images):
                taken = min(size - count, len(images))
                batch[count : count + taken] = images[:taken]
                images, count = images[taken:], count + taken
                if count == size:
                    yield batch, count, scenes
                    # JAX may keep what it was given for longer than the call: the next batch gets memory of its own.
                    batch, count, scenes = np.zeros_like(batch), 0, []
        if count or scenes:
            yield batch, count, scenes

    def _scenes(
        self, calls: Iterator[_Call], skipped: SkippedItems, meter: EncodingProgress
    ) -> Iterator[GroupedScene]:
        """The scenes of one shard, as their last codes come from the devices."""
        waiting: collections.deque[DecodedScene] = collections.deque()
        ready = np.zeros((0, self._tokenizer.codes_per_image), np.uint16)  # [images, N]
        for call in calls:
            waiting += call.scenes
            if call.codes is not None:
                with meter.waiting("device"):
                    codes = np.asarray(call.codes)[: call.count]
                ready = np.concatenate([ready, codes])
            meter.add(call.count, sum(scene.is_last for scene in call.scenes))
            while waiting and len(ready) >= waiting[0].num_images:
                scene = waiting.popleft()
                skipped.failures += [{"key": item.key, "reason": item.reason} for item in scene.failures]
                if scene.num_images:
                    codes, ready = ready[: scene.num_images], ready[scene.num_images :]
                    yield self._scene(scene.info, codes)
                else:
                    skipped.groups.append(split.group_hash(scene.info.group))


class EncodingProgress:
    """How fast images become codes, and what that waits for.

    Args:
      total: scenes to do.
    """

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._begin()

    def _begin(self) -> None:
        self._since, self._images, self._scenes = time.monotonic(), 0, 0
        self._waited = {"host": 0.0, "device": 0.0}

    @contextlib.contextmanager
    def waiting(self, whom: str) -> Iterator[None]:
        """Counts the time inside as waiting for the "host" or the "device"."""
        start = time.monotonic()
        yield
        self._waited[whom] += time.monotonic() - start

    def waiting_for_each(self, items: Iterator[T]) -> Iterator[T]:
        """The items, the time until each counted as waiting for the host."""
        while True:
            with self.waiting("host"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def add(self, images: int, scenes: int) -> None:
        """Counts what is encoded; says how it goes from time to time."""
        self._images, self._scenes, self._done = (
            self._images + images,
            self._scenes + scenes,
            self._done + scenes,
        )
        if time.monotonic() - self._since > _SAY_EVERY:
            log_info(self.line())

    def line(self) -> str:
        """`120/400 scenes (30 %), 41.2 images/s, 1m32s left, host-bound: …`, of the time since the line before."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        shares = {whom: waited / seconds for whom, waited in self._waited.items()}
        left = (
            duration((self._total - self._done) * seconds / self._scenes) if self._scenes else "unknown time"
        )
        bound = max(shares, key=shares.__getitem__)
        line = (
            f"{self._done}/{self._total} scenes ({self._done / self._total:.0%}), "
            f"{self._images / seconds:.3g} images/s, {left} left, {bound}-bound: waited {shares['host']:.0%} of the "
            f"time for images and {shares['device']:.0%} for codes"
        )
        self._begin()
        return line


def software_versions() -> dict[str, str]:
    """Versions of what images and codes are made by; of libjpeg-turbo the one that Pillow brings."""
    found = {}
    for name in _SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"libjpeg_turbo": PIL.features.version("libjpeg_turbo") or ""}
