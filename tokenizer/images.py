"""Training images of a tokenizer: batches streamed from an image source, each a pure function of (seed, step)."""

import dataclasses
import json
import pathlib
import pickle
import tempfile
import threading
from collections.abc import Sequence
from typing import Self

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.seeding import derive_seed
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.catalog import POOLS, Catalog, index_image
from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decode_worker import Limits
from lvm.data.images.image_loader import ImageItem, ImageLoader, SceneCache
from lvm.data.images.image_order import RowOrder
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import NUM_SAMPLES, RandomCrop
from lvm.data.images.sources import Failure, ImageSource
from lvm.data.mixture import split
from lvm.data.mixture.counter_rng import CounterRng

_CHUNK_IMAGES = 16  # that a worker loads at once
_MAX_REPLACED = 256  # images in a row that can't be read
_MAX_LOGGED = 1000  # of those


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Training data of a tokenizer.

    Attributes:
      source: image source: a folder, a file, a pattern, a URL, or a config file.
      heldout_fraction: share of the groups in the held-out split.
      rgb_share: of `rgb` images in a batch; images of other streams, which the source must have, fill the rest.
      max_scenes: limit of scenes to train on, the first ones; 0 for all.
      crop: random crops and flips; None preprocesses whole images as for encoding.
      mixed_files: files whose images a batch mixes (`lvm.data.images.image_order`). So many, and as many again that
        come next, are on a host's disk if the source is on object storage and the host reads all rows.
      cache_gigabytes: limit of a local cache of decoded scenes; 0 for none. It needs crop=None.
      cache_folder: of the cache, kept after the run; "" for a temporary one.
      decoding: limits of a worker process; what exceeds them is skipped.
    """

    source: str = ""
    heldout_fraction: float = 0.05
    rgb_share: float = 1.0
    max_scenes: int = 0
    crop: RandomCrop | None = dataclasses.field(default_factory=RandomCrop)
    mixed_files: int = 64
    cache_gigabytes: float = 0.0
    cache_folder: str = ""
    decoding: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        split.check_fraction(self.heldout_fraction)
        if not 0 <= self.rgb_share <= 1:
            raise UserError(f"rgb_share={self.rgb_share} must be in [0, 1]")
        check_non_negative(self, "max_scenes", "cache_gigabytes")
        check_positive(self, "mixed_files")
        if self.cache_gigabytes and self.crop:
            raise UserError(f"cache_gigabytes={self.cache_gigabytes} keeps whole images; it needs crop=None")


class TrainingImages:
    """Batches of images, as a context; leaving it ends its worker processes.

    `rgb` images and those of all other streams are two pools, each in an order of its own (`Lane`). An image that can't
    be read is replaced by the next one in the order that can, and logged.

    Args:
      source: opened with `preprocess`.
      folder: for counts of the source's images, which a resumed run needs not list again.
      workers: processes that decode; 0 decodes in threads of this one.
      process: of this process, among those that share `folder`.

    Raises:
      UserError: as `Catalog` does, negative `workers`, or a batch too small for `rgb_share`.
    """

    def __init__(
        self, source: ImageSource, config: ImagesConfig, preprocess: Preprocess, batch_size: int, seed: int,
        folder: epath.PathLike, workers: int = 0, process: int = 0,
    ):  # fmt: skip
        self._source, self._config, self._preprocess = source, config, preprocess
        num_rgb = round(config.rgb_share * batch_size)
        if 0 < config.rgb_share < 1 and num_rgb in (0, batch_size):
            raise UserError(
                f"config.batch_size={batch_size} has no image of one kind at "
                f"config.data.rgb_share={config.rgb_share:g}; use a larger batch, or a share of 0 or 1"
            )
        self._catalog = Catalog(source, config.heldout_fraction, config.max_scenes, folder, process)
        pool_rows = (num_rgb, batch_size - num_rgb)
        self._order = RowOrder(self._catalog, pool_rows, config.mixed_files, seed)
        self._batch_size, self._rng_seed = batch_size, derive_seed(seed, len(POOLS))
        self._pool = DecodePool(workers, config.decoding)
        self._cache: SceneCache | None = None
        self._temporary_cache = tempfile.TemporaryDirectory(prefix="image_cache-")
        if config.cache_gigabytes:
            identity = json.dumps([source.describe(), preprocess.to_json()], sort_keys=True, default=str)
            name = f"{split.content_hash(identity.encode()):016x}"
            cache_folder = pathlib.Path(config.cache_folder or self._temporary_cache.name, name)
            self._cache = SceneCache(cache_folder, config.cache_gigabytes)
        self._loader: ImageLoader | None = None
        self._streams = set[str]()  # that the loader has the codecs of
        self._lock, self._logged = threading.Lock(), set[Failure]()

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)
        self._order.close()
        self._catalog.close()
        self._temporary_cache.cleanup()

    def read(self, step: int, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n R R 3"]]:
        """Returns rows of a step's `images`; rows are ascending.

        Raises:
          UserError: the train split has no image of a pool, or 256 in a row that can't be read.
        """
        R = self._preprocess.resolution
        images = np.empty((len(rows), R, R, 3), np.uint8)
        samples = CounterRng(self._rng_seed, step * self._batch_size + rows).bits(NUM_SAMPLES) / 2.0**64  # [n, samples]
        samples = np.minimum(samples, np.nextafter(1.0, 0.0))
        missing = np.arange(len(rows))
        for shift in range(_MAX_REPLACED):
            with self._order.images(step, rows[missing], shift) as located:
                of_row = [tuple(samples[i].tolist()) if self._config.crop else () for i in missing.tolist()]
                items = [ImageItem(*image, sample) for image, sample in zip(located, of_row, strict=True)]
                loaded = self._load(items)
            for i, image in zip(missing.tolist(), loaded, strict=True):
                if not isinstance(image, Failure):
                    images[i] = image
            missing = missing[[isinstance(image, Failure) for image in loaded]]
            if not len(missing):
                return {"images": images}
        last = next(image for image in loaded if isinstance(image, Failure))
        raise UserError(
            f"config.data.source={self._config.source}: none of {_MAX_REPLACED} images in a row could be read; the "
            f"last, {last.key}: {last.reason}"
        )

    def heldout(self, limit: int) -> dict[str, UInt8[np.ndarray, "_ R R 3"]]:
        """Returns up to `limit` images of each stream of the held-out split, spread over its scenes.

        Raises:
          UserError: scenes are held out, and none of these images could be read.
        """
        scenes = self._catalog.heldout
        infos = [self._source.info(scene) for scene in scenes]
        by_stream: dict[str, np.ndarray] = {}
        failures: list[Failure] = []
        for stream in dict.fromkeys(stream for info in infos for stream in info.streams):
            ends = np.cumsum([info.num_frames if stream in info.streams else 0 for info in infos])
            items = []
            for image in range(0, int(ends[-1]), -(-int(ends[-1]) // limit)):
                i = int(np.searchsorted(ends, image, side="right"))
                frame = image - int(ends[i]) + infos[i].num_frames
                items.append(ImageItem(*index_image(infos[i], frame, stream), pickle.dumps(scenes[i]), ()))
            loaded = self._load(items)
            failures += [image for image in loaded if isinstance(image, Failure)]
            if readable := [image for image in loaded if not isinstance(image, Failure)]:
                by_stream[stream] = np.stack(readable)
        self._catalog.release_heldout()
        if scenes and not by_stream:
            raise UserError(
                f"config.data.source={self._config.source}: no image of the held-out split could be read; the last, "
                f"{failures[-1].key}: {failures[-1].reason}"
            )
        return by_stream

    def _load(self, items: Sequence[ImageItem]) -> list[np.ndarray | Failure]:
        loader = self._loader_of_all_streams()
        chunks = (Chunk(loader, items[i : i + _CHUNK_IMAGES]) for i in range(0, len(items), _CHUNK_IMAGES))
        loaded: list[np.ndarray | Failure] = [image for _, results in self._pool.map(chunks) for image in results]
        for image in loaded:
            if isinstance(image, Failure) and image not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(image)
                log_info(f"skipped {image.key}: {image.reason}")
        return loaded

    def _loader_of_all_streams(self) -> ImageLoader:
        """Workers get the codecs of streams, which files that are listed may add, with the source."""
        with self._lock:
            streams = set(self._catalog.streams)
            if self._loader is None or streams - self._streams:
                self._source.codecs(streams)
                self._loader = ImageLoader(self._source.for_workers(), self._preprocess, self._config.crop, self._cache)
                self._streams = streams
            return self._loader
