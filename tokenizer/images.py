"""Batches of images to train a tokenizer with: every image of a source, held in memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np

from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info
from lvm.common.seeding import derive_seed
from lvm.data.images.sources import Failure, ImageSource
from lvm.data.mixture import split
from lvm.data.mixture.permutation import permute


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """What a tokenizer is trained on.

    Attributes:
      source: a folder of images, or a config file that describes a source.
      heldout_fraction: share of the groups that training never sees.
      rgb_share: share of a batch that is `rgb` images; images of the other streams fill the rest.
      max_scenes: only that many scenes of each side are read; 0 reads all.
      max_gigabytes: refuses a source that would take more memory.
    """

    source: str = ""
    heldout_fraction: float = 0.05
    rgb_share: float = 0.5
    max_scenes: int = 0
    max_gigabytes: float = 8.0

    def __post_init__(self) -> None:
        split.check_fraction(self.heldout_fraction)
        if not 0 <= self.rgb_share <= 1:
            raise UserError(f"rgb_share: {self.rgb_share} is not in [0, 1]")
        if self.max_scenes < 0:
            raise UserError(f"max_scenes: {self.max_scenes} is negative")


def split_scenes(source: ImageSource, config: ImagesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the scenes to train on, and of those held out."""
    hashes = np.array([split.group_hash(source.info(i).group) for i in range(len(source))], np.uint64)
    mask = split.heldout_mask(hashes, config.heldout_fraction)
    limit = config.max_scenes or len(source)
    return np.flatnonzero(~mask)[:limit], np.flatnonzero(mask)[:limit]


class ImagePool:
    """All images of some scenes, by stream.

    Attributes:
      images: stream → uint8 [n, R, R, 3].

    Raises:
      UserError: the images need more than `max_gigabytes`.
    """

    def __init__(self, source: ImageSource, numbers: np.ndarray, resolution: int, max_gigabytes: float):
        infos = [source.info(int(i)) for i in numbers]
        gigabytes = sum(info.num_frames * len(info.streams) for info in infos) * resolution**2 * 3 / 1e9
        if gigabytes > max_gigabytes:
            raise UserError(
                f"config.data.source: {gigabytes:.1f} GB of images, max_gigabytes is {max_gigabytes}; "
                "raise it, or set config.data.max_scenes"
            )
        by_stream: dict[str, list[np.ndarray]] = {}
        failures: list[Failure] = []
        progress = Progress(len(infos), unit="scenes")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for done, scene in enumerate(pool.map(lambda i: source.load(int(i)), numbers), 1):
                failures += scene.failures
                for column, stream in enumerate(scene.info.streams):
                    by_stream.setdefault(stream, []).append(scene.images[:, column])
                if done % 250 == 0:
                    log_info(f"reading images: {progress.line(done)}")
        for failure in failures:
            log_info(f"skipped {failure.key}: {failure.reason}")
        self.images = {stream: np.concatenate(parts) for stream, parts in by_stream.items()}


class TrainingImages:
    """Batches drawn from a pool, each a pure function of (seed, step).

    Raises:
      UserError: the pool is empty.
    """

    def __init__(self, pool: ImagePool, rgb_share: float, batch_size: int, seed: int):
        if not any(len(images) for images in pool.images.values()):
            raise UserError(
                "config.data.source: none of the scenes to train on has an image that can be read"
            )
        rgb = pool.images.get("rgb")
        others = [images for stream, images in pool.images.items() if stream != "rgb" and len(images)]
        self._parts = [part for part in (rgb, np.concatenate(others) if others else None) if part is not None]
        shares = [batch_size] if len(self._parts) == 1 else [round(rgb_share * batch_size)]
        self._shares = shares if len(self._parts) == 1 else [shares[0], batch_size - shares[0]]
        self._seed = seed

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """{"images": uint8 [B, R, R, 3]}; each part of the pool is gone through in a new order each epoch."""
        rows = []
        for part, (images, share) in enumerate(zip(self._parts, self._shares, strict=True)):
            places = np.arange(step * share, (step + 1) * share)
            for epoch in np.unique(places // len(images)):
                mine = places[places // len(images) == epoch] % len(images)
                rows.append(images[permute(mine, len(images), derive_seed(self._seed, part, int(epoch)))])
        return {"images": np.concatenate(rows)}
