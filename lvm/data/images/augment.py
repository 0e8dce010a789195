"""Random crops and flips of scenes before encoding: codes can't be augmented later."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.scene import SceneImages
from lvm.data.mixture import split
from lvm.data.streams.codecs import Codec

_CROP_SCALE = 1.125  # side of the images that crops are taken from, relative to the crop's


@dataclasses.dataclass(frozen=True)
class Augment:
    """Seeded copies of every scene, each cropped and flipped at random.

    A crop is a window of a larger image, pixel by pixel: nothing is resampled, so palette colors and depth stay exact.
    All frames and streams of a scene share the window, and are flipped together by their codecs.

    Raises:
      UserError: a negative number of copies.
    """

    copies: int  # per scene; 0 leaves scenes as they are
    preprocess: Preprocess  # of the resulting images

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise UserError(f"--augment={self.copies} must not be negative")

    @property
    def source_preprocess(self) -> Preprocess:
        """The preprocess that the source must use."""
        if not self.copies:
            return self.preprocess
        R = self.preprocess.resolution
        return dataclasses.replace(self.preprocess, resolution=max(round(_CROP_SCALE * R), R + 1))

    def __call__(self, scene: SceneImages, codecs: Mapping[str, Codec]) -> Iterator[SceneImages]:
        """Yields copies `key#0` … of a scene preprocessed by `source_preprocess`; the scene itself if `copies` is 0."""
        if not self.copies:
            yield scene
            return
        side, R = scene.images.shape[2], self.preprocess.resolution
        for copy in range(self.copies):
            info = dataclasses.replace(scene.info, key=f"{scene.info.key}#{copy}")
            rng = np.random.default_rng(split.content_hash(info.key.encode()))
            top, left = rng.integers(0, side - R, 2, endpoint=True)
            images = scene.images[:, :, top : top + R, left : left + R]
            if rng.random() < 0.5:
                images = mirror_images(images, [codecs[stream] for stream in info.streams])
            yield SceneImages(info, images)


def mirror_images(images: UInt8[np.ndarray, "T S R R 3"], codecs: Sequence[Codec]) -> UInt8[np.ndarray, "T S R R 3"]:
    """Flips a scene horizontally, each stream by its codec."""
    mirrored = (codec.mirror(image) for frame in images for codec, image in zip(codecs, frame, strict=True))
    return np.stack(list(mirrored)).reshape(images.shape)
