"""Training images of a tokenizer: a source held in memory, and batches sampled from it."""

import concurrent.futures
import dataclasses

import numpy as np
from jaxtyping import Int, UInt8

from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info
from lvm.common.seeding import derive_seed
from lvm.common.validation import check_non_negative
from lvm.data.images.sources import Failure, ImageSource
from lvm.data.mixture import split
from lvm.data.mixture.permutation import permute

_LOG_EVERY = 250  # scenes


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Training data of a tokenizer."""

    source: str = ""  # image source: a folder, a file, or a config file
    heldout_fraction: float = 0.05  # share of the groups in the held-out split
    rgb_share: float = 0.5  # of `rgb` images in a batch; images of other streams fill the rest
    max_scenes: int = 0  # limit of scenes read per split; 0 for all
    max_gigabytes: float = 8.0  # limit of memory for the images

    def __post_init__(self) -> None:
        split.check_fraction(self.heldout_fraction)
        if not 0 <= self.rgb_share <= 1:
            raise UserError(f"rgb_share={self.rgb_share} must be in [0, 1]")
        check_non_negative(self, "max_scenes")


def split_scenes(
    source: ImageSource, config: ImagesConfig
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " heldout"]]:
    """Indices of the scenes in the train and held-out splits."""
    hashes = np.array([split.group_hash(source.info(i).group) for i in range(len(source))], np.uint64)
    mask = split.heldout_mask(hashes, config.heldout_fraction)
    limit = config.max_scenes or len(source)
    return np.flatnonzero(~mask)[:limit], np.flatnonzero(mask)[:limit]


def load_images(
    source: ImageSource, scenes: Int[np.ndarray, " n"], resolution: int, max_gigabytes: float
) -> dict[str, UInt8[np.ndarray, "_ R R 3"]]:
    """Reads all images of some scenes, by stream.

    Raises:
      UserError: the images need more than `max_gigabytes`.
    """
    infos = [source.info(i) for i in scenes.tolist()]
    gigabytes = sum(info.num_frames * len(info.streams) for info in infos) * resolution**2 * 3 / 1e9
    if gigabytes > max_gigabytes:
        raise UserError(
            f"config.data.max_gigabytes={max_gigabytes}: the source has {gigabytes:.1f} GB of images; raise it, or set "
            "config.data.max_scenes"
        )
    by_stream: dict[str, list[np.ndarray]] = {}
    failures: list[Failure] = []
    progress = Progress(len(infos), unit="scenes")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done, scene in enumerate(pool.map(source.load, scenes.tolist()), 1):
            failures += scene.failures
            for i, stream in enumerate(scene.info.streams):
                by_stream.setdefault(stream, []).append(scene.images[:, i])
            if done % _LOG_EVERY == 0:
                log_info(f"reading images: {progress.line(done)}")
    for failure in failures:
        log_info(f"skipped {failure.key}: {failure.reason}")
    return {stream: np.concatenate(images) for stream, images in by_stream.items()}


class TrainingImages:
    """Batches sampled from images by stream, each a pure function of (seed, step).

    `rgb` images and those of all other streams are two pools. Each is traversed in a new order every epoch.

    Raises:
      UserError: there are no images.
    """

    def __init__(self, images: dict[str, UInt8[np.ndarray, "_ R R 3"]], rgb_share: float, batch_size: int, seed: int):
        if not any(map(len, images.values())):
            raise UserError("config.data.source: no image of the train split could be read")
        others = [x for stream, x in images.items() if stream != "rgb" and len(x)]
        self._pools = ([images["rgb"]] if "rgb" in images else []) + ([np.concatenate(others)] if others else [])
        num_rgb = round(rgb_share * batch_size)
        self._counts = [batch_size] if len(self._pools) == 1 else [num_rgb, batch_size - num_rgb]
        self._seed = seed

    def batch(self, step: int) -> dict[str, UInt8[np.ndarray, "B R R 3"]]:
        """The `images` of a step."""
        batch = []
        for i, (pool, count) in enumerate(zip(self._pools, self._counts, strict=True)):
            positions = np.arange(step * count, (step + 1) * count)
            for epoch in np.unique(positions // len(pool)).tolist():
                in_epoch = positions[positions // len(pool) == epoch] % len(pool)
                batch.append(pool[permute(in_epoch, len(pool), derive_seed(self._seed, i, epoch))])
        return {"images": np.concatenate(batch)}
