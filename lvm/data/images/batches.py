"""Scenes of a source, read and decoded a chunk at a time: what worker processes do ahead of an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.images.augment import Augment
from lvm.data.images.sources.base import Failure, ImageSource, SceneInfo

_IMAGES = 64  # about as many in a chunk
_LOOKED_AT = 8  # scenes of a slice, for how many images one has: photos may come before videos


@dataclasses.dataclass(frozen=True)
class DecodedScene:
    """A scene whose images are in the same chunk.

    Attributes:
      info: with the frames that are there.
      num_images: of all frames and streams; 0 where nothing could be read.
      failures: what could not be read of it.
      is_last: of those that one scene of the source became.
    """

    info: SceneInfo
    num_images: int
    failures: tuple[Failure, ...]
    is_last: bool


class ImageBatcher:
    """Slices of a source in chunks of whole scenes, by number. May be sent to another process.

    Args:
      source: the scenes.
      ranges: (first, last) of each, in the order in which they are read.
      augment: what is made of each scene.
    """

    def __init__(self, source: ImageSource, ranges: Sequence[tuple[int, int]], augment: Augment):
        self._source, self._ranges, self._augment = source, list(ranges), augment
        self._sizes = [max(1, _IMAGES // self._images(*ends)) for ends in self._ranges]  # in scenes
        counts = [
            -(-(last - first) // size) for (first, last), size in zip(self._ranges, self._sizes, strict=True)
        ]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """The chunk at `number`.

        Returns:
          range: int64 [], which range it belongs to; images: uint8 [n, R, R, 3] of its scenes, one after the other,
          frame-major; scenes: `DecodedScene` [scenes], as objects.
        """
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        first, last = self._ranges[place]
        first += (number - int(self._starts[place])) * self._sizes[place]
        scenes: list[DecodedScene] = []
        R = self._augment.preprocess.resolution
        images = [np.zeros((0, R, R, 3), np.uint8)]
        for index in range(first, min(first + self._sizes[place], last)):
            loaded = self._source.load(index)
            readable = bool(len(loaded.images))
            failures = loaded.failures
            if not readable and not failures:
                failures = (Failure(loaded.info.key, "it holds no frame"),)
            if failures:
                scenes.append(DecodedScene(loaded.info, 0, failures, is_last=not readable))
            copies = list(self._augment(loaded, self._source.streams)) if readable else []
            for number, copy in enumerate(copies, 1):
                images.append(copy.images.reshape(-1, R, R, 3))
                scenes.append(DecodedScene(copy.info, len(images[-1]), (), is_last=number == len(copies)))
        listed = np.empty(len(scenes), object)
        listed[:] = scenes
        return {"range": np.array(place), "images": np.concatenate(images), "scenes": listed}

    def _images(self, first: int, last: int) -> int:
        """Images of a scene, the most of some that are spread over a slice."""
        some = np.unique(np.linspace(first, last - 1, _LOOKED_AT).astype(int)).tolist()
        most = max(info.num_frames * len(info.streams) for info in map(self._source.info, some))
        return max(1, most * max(1, self._augment.copies))
