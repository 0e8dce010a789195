"""Batches of a source's images, decoded in worker processes: each batch of one stream."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator

import numpy as np
from jaxtyping import UInt8

from lvm.common.logging import log_info
from lvm.data.images.augment import Augment
from lvm.data.images.decode_pool import DecodePool
from lvm.data.images.decode_worker import Limits
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import ImageSource
from lvm.data.images.sources.scene import Failure
from tokenizer.encoding_progress import EncodingProgress
from tokenizer.scene_stream import list_parts, load_scenes

_MAX_LOGGED = 100  # of the data that can't be read


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Images of one stream; the last batch of a stream is padded.

    Attributes:
      keys: of the images, whose number is that of all but the padding; frames of a scene end in `#FRAME`.
      groups: of each image's scene.
    """

    stream: str
    keys: list[str]
    groups: list[str]
    images: UInt8[np.ndarray, "B R R 3"]


class ImageBatches:
    """Iterates once over a source's images, in an order that depends on the source alone.

    Args:
      source: opened with `preprocess`.
      workers: processes that decode; 0 decodes in threads of this one.
      max_images: limit of images, the first ones; 0 for all.

    Attributes:
      num_skipped: data that couldn't be read.
      progress: in scenes; `add` is the iterator's to call.
    """

    def __init__(
        self, source: ImageSource, preprocess: Preprocess, batch_size: int, workers: int, limits: Limits,
        max_images: int = 0,
    ):  # fmt: skip
        self._source, self._augment, self._batch_size = source, Augment(0, preprocess), batch_size
        self._workers, self._limits, self._max_images = workers, limits, max_images
        self.num_skipped, self.progress = 0, EncodingProgress()

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yields batches; ends its worker processes with the iterator."""
        R, count = self._augment.preprocess.resolution, 0
        batches: dict[str, ImageBatch] = {}  # that are being filled, by stream
        with contextlib.closing(self._images()) as images:
            for stream, key, group, image in images:
                batch = batches.get(stream)
                if batch is None:
                    empty = np.zeros((self._batch_size, R, R, 3), np.uint8)
                    batch = batches[stream] = ImageBatch(stream, [], [], empty)
                batch.images[len(batch.keys)] = image
                batch.keys.append(key)
                batch.groups.append(group)
                if len(batch.keys) == self._batch_size:
                    yield batches.pop(stream)
                count += 1
                if count == self._max_images:
                    break
        yield from batches.values()

    def _images(self) -> Generator[tuple[str, str, str, np.ndarray]]:
        """Yields stream, key, group and pixels of each image."""
        self.progress.expect(len(self._source.plan(0, 1)))
        with (
            contextlib.closing(list_parts(self._source, (0,), 1, self.progress)) as parts,
            DecodePool(self._workers, self._limits) as pool,
        ):
            loaded = load_scenes(pool, self._source, self._augment, parts, lambda _, failures: self._skip(*failures))
            for _, chunk in self.progress.timed("host", loaded):
                for scene, images in (result for results in chunk for result in results):
                    self._skip(*scene.failures)
                    streams = scene.info.streams
                    for i, image in enumerate(images):  # frame-major
                        frame = f"#{i // len(streams)}" if len(images) > len(streams) else ""
                        yield streams[i % len(streams)], f"{scene.info.key}{frame}", scene.info.group, image
                    self.progress.add(len(images), int(scene.is_last))

    def _skip(self, *failures: Failure) -> None:
        for failure in failures:
            self.num_skipped += 1
            if self.num_skipped <= _MAX_LOGGED:
                log_info(f"skipped {failure.key}: {failure.reason}")
