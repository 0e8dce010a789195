"""Batches of decoded scenes, prepared by worker processes ahead of an encoder."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.images.augment import Augment
from lvm.data.images.sources.base import Failure, ImageSource, SceneInfo

_BATCH_IMAGES = 64  # approximate images per batch
_PROBED_SCENES = 8  # scenes of a range that are probed for their size: videos may come after photos


@dataclasses.dataclass(frozen=True)
class DecodedScene:
    """A scene whose images are in the same batch."""

    info: SceneInfo  # with the number of readable frames
    num_images: int  # of all frames and streams; 0 if nothing could be read
    failures: tuple[Failure, ...]
    is_last: bool  # the last result of its scene in the source: there is one per augmented copy


class ImageBatcher:
    """Batches of whole scenes, each augmented, from ranges (first, end) of a source in reading order, by index.

    Can be pickled for worker processes.
    """

    def __init__(self, source: ImageSource, ranges: Sequence[tuple[int, int]], augment: Augment):
        self._source, self._ranges, self._augment = source, list(ranges), augment
        self._sizes = [max(1, _BATCH_IMAGES // self._max_images(*ends)) for ends in self._ranges]  # in scenes
        ends = zip(self._ranges, self._sizes, strict=True)
        self._starts = np.cumsum([0, *(-(-(end - first) // size) for (first, end), size in ends)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes a batch.

        Returns:
          range: int64 [], the index of its range; images: uint8 [n, R, R, 3] of its scenes, one after the other,
          frame-major; scenes: `DecodedScene` [scenes], as objects.
        """
        range_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        first, end = self._ranges[range_index]
        size = self._sizes[range_index]
        first += (index - int(self._starts[range_index])) * size
        scenes: list[DecodedScene] = []
        R = self._augment.preprocess.resolution
        images = [np.zeros((0, R, R, 3), np.uint8)]
        for scene_index in range(first, min(first + size, end)):
            scene = self._source.load(scene_index)
            copies = list(self._augment(scene, self._source.streams)) if len(scene.images) else []
            failures = scene.failures
            if not copies and not failures:
                failures = (Failure(scene.info.key, "it has no frames"),)
            if failures:
                scenes.append(DecodedScene(scene.info, 0, failures, is_last=not copies))
            for i, copy in enumerate(copies, 1):
                images.append(copy.images.reshape(-1, R, R, 3))
                scenes.append(DecodedScene(copy.info, len(images[-1]), (), is_last=i == len(copies)))
        scene_array = np.empty(len(scenes), object)
        scene_array[:] = scenes
        return {"range": np.array(range_index), "images": np.concatenate(images), "scenes": scene_array}

    def _max_images(self, first: int, end: int) -> int:
        """Returns the images of a scene: the most among some that are spread over a range."""
        probed = np.unique(np.linspace(first, end - 1, _PROBED_SCENES).astype(int)).tolist()
        images = max(info.num_frames * len(info.streams) for info in map(self._source.info, probed))
        return max(1, images * max(1, self._augment.copies))
