"""Scenes of a source, decoded and augmented for an encoder."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lvm.data.images.augment import Augment
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.scene import Failure, SceneInfo

_CHUNK_IMAGES = 64  # approximate images per chunk
_PROBED_SCENES = 8  # scenes of a range that are probed for their size: videos may come after photos


@dataclasses.dataclass(frozen=True)
class DecodedScene:
    """A decoded scene, or augmented copy of one, without its images."""

    info: SceneInfo  # with the number of readable frames
    num_images: int  # of all frames and streams; 0 if nothing could be read
    failures: tuple[Failure, ...]
    is_last: bool  # the last result of its scene in the source: there is one per augmented copy


Decoded = list[tuple[DecodedScene, UInt8[np.ndarray, "n R R 3"]]]  # images are frame-major


class SceneDecoder:
    """Decodes and augments scenes of a source, as in its `Part`s or by index. A `Loader` of a `DecodePool`."""

    def __init__(self, source: ImageSource, augment: Augment):
        self._source, self._augment = source, augment

    def chunks(self, scenes: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Yields the scenes of a `Part` in order, about 64 images at once; one empty chunk where there are none."""
        if not scenes:
            yield scenes
            return
        probed = np.unique(np.linspace(0, len(scenes) - 1, _PROBED_SCENES).astype(int)).tolist()
        size = max(1, _CHUNK_IMAGES // max(self.num_images(scenes[i]) for i in probed))
        for start in range(0, len(scenes), size):
            yield scenes[start : start + size]

    def num_images(self, item: Any) -> int:
        """Returns the images of a scene and its copies, at least 1."""
        info = self._source.info(item)
        return max(1, info.num_frames * len(info.streams) * max(1, self._augment.copies))

    def __call__(self, item: Any) -> Decoded:
        """Decodes a scene. The result has a scene for each copy; one without images lists the failures."""
        scene, R = self._source.load(item), self._augment.preprocess.resolution
        copies = list(self._augment(scene, self._source.codecs(scene.info.streams))) if len(scene.images) else []
        failures = scene.failures
        if not copies and not failures:
            failures = (Failure(scene.info.key, "it has no frames"),)
        decoded = [self._without_images(scene.info, failures, is_last=not copies)] if failures else []
        for i, copy in enumerate(copies, 1):
            images = copy.images.reshape(-1, R, R, 3)
            decoded.append((DecodedScene(copy.info, len(images), (), is_last=i == len(copies)), images))
        return decoded

    def failed(self, item: Any, reason: str) -> Decoded:
        """Returns the result of a scene that can't be decoded."""
        info = self._source.info(item)
        return [self._without_images(info, (Failure(info.key, reason),), is_last=True)]

    def _without_images(
        self, info: SceneInfo, failures: tuple[Failure, ...], is_last: bool
    ) -> tuple[DecodedScene, UInt8[np.ndarray, "0 R R 3"]]:
        R = self._augment.preprocess.resolution
        return DecodedScene(info, 0, failures, is_last), np.zeros((0, R, R, 3), np.uint8)
