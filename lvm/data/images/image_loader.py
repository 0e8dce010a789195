"""Loads single images of scenes in worker processes, with a random crop or from a cache of decoded scenes."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import pickle
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8

from lvm.data.images.catalog import locate_image
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import Crop, RandomCrop
from lvm.data.images.sources import Failure, ImageSource
from lvm.data.images.sources.image_file import UnreadableError


class ImageItem(NamedTuple):
    """An image to load."""

    pool: int  # index in `catalog.POOLS`
    image: int  # its index among those of the pool in its scene
    scene: bytes  # pickled, as in the source's `Part`
    samples: tuple[float, ...]  # `NUM_SAMPLES` random numbers in [0, 1); () for the image as it is


class SceneCache:
    """Decoded scenes on a local disk, a file each, up to a size that the processes that share its folder keep to."""

    def __init__(self, folder: pathlib.Path, gigabytes: float):
        self._folder, self._limit = folder, int(gigabytes * 1e9)
        self._reserved = (0, 0)  # bytes of the log that were read, and the sum of their sizes

    def get(self, key: str, shape: tuple[int, ...], load: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """Returns a cached uint8 array, memory-mapped, or what `load` returns, which is kept if there is room."""
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        path = self._folder / name[:2] / name
        if path.exists():
            return np.memmap(path, np.uint8, "r", shape=shape)
        array = load()
        if array is not None and self._reserve(array.nbytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            temporary.write_bytes(array.tobytes())
            os.replace(temporary, path)
        return array

    def _reserve(self, size: int) -> bool:
        """Adds to the sizes that all processes have reserved, unless that exceeds the limit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Appending needs no lock, which not every file system has. The sizes up to one's own decide.
        with open(self._folder / "sizes", "a+b", buffering=0) as log:
            if self._total(log, log.seek(0, os.SEEK_END)) + size > self._limit:
                return False
            log.write(b"%d\n" % size)
            if self._total(log, log.tell()) <= self._limit:
                return True
            log.write(b"-%d\n" % size)  # another process was faster
        return False

    def _total(self, log: BinaryIO, end: int) -> int:
        """The sum of the sizes in the log up to `end`."""
        position, total = self._reserved
        if end > position:  # else another thread has read on
            log.seek(position)
            total += sum(map(int, log.read(end - position).split()))
            self._reserved = (end, total)
        return total


class ImageLoader:
    """Loads the images of `ImageItem`s, each as uint8 [R, R, 3], or its Failure. A `Loader` of a `DecodePool`.

    Args:
      source: as `for_workers` returns it.
      preprocess: of images as they are.
      crop: of random crops; None for none.
      cache: of scenes, from which images as they are come.
    """

    def __init__(
        self, source: ImageSource, preprocess: Preprocess, crop: RandomCrop | None, cache: SceneCache | None = None
    ):  # fmt: skip
        self._source, self._preprocess, self._settings, self._cache = source, preprocess, crop, cache
        fields = {field.name: getattr(preprocess, field.name) for field in dataclasses.fields(preprocess)}
        self._crop = Crop(**fields, settings=crop) if crop else None

    def __call__(self, item: ImageItem) -> UInt8[np.ndarray, "R R 3"] | Failure:
        """Loads an image."""
        scene = pickle.loads(item.scene)
        info = self._source.info(scene)
        frame, stream = locate_image(info, item.pool, item.image)
        try:
            if not self._crop or not item.samples:
                return self._load_whole(scene, frame, stream)
            *window, flip = item.samples
            crop = dataclasses.replace(self._crop, samples=tuple(window))
            image = self._source.load_image(scene, frame, stream, crop)
        except UnreadableError as error:
            return Failure(info.key, str(error))
        codec = self._source.codecs((stream,))[stream]
        return codec.mirror(image) if self._settings and self._settings.flip and flip < 0.5 else image

    def num_images(self, item: ImageItem) -> int:
        """Returns 1."""
        return 1

    def failed(self, item: ImageItem, reason: str) -> Failure:
        """Returns the failure of an image that ends its process."""
        return Failure(self._source.info(pickle.loads(item.scene)).key, reason)

    def _load_whole(self, scene: Any, frame: int, stream: str) -> UInt8[np.ndarray, "R R 3"]:
        info = self._source.info(scene)
        if self._cache:
            R = self._preprocess.resolution
            shape = (info.num_frames, len(info.streams), R, R, 3)
            images = self._cache.get(info.key, shape, functools.partial(self._load_scene, scene))
            if images is not None:
                return images[frame, info.streams.index(stream)]
        return self._source.load_image(scene, frame, stream, self._preprocess)

    def _load_scene(self, scene: Any) -> np.ndarray | None:
        """Decodes a scene; None if any of its frames can't be read."""
        loaded = self._source.load(scene)
        return None if loaded.failures else loaded.images
