"""Crops and flips of scenes before they are encoded: codes can't be augmented later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import SceneImages
from lvm.data.mixture import split
from lvm.data.streams.codecs import Codec

_LARGER = 1.125  # the side of what is cropped, in sides of an image


@dataclasses.dataclass(frozen=True)
class Augment:
    """Seeded copies of every scene, each cropped at random and mirrored by chance.

    A crop takes a window of the image's size out of a larger one, pixel by pixel: nothing is resampled, so that the
    colours of a palette and the readings of a depth map stay what they are. All frames and streams of a scene have the
    same window, and are mirrored together, by their codecs.

    Attributes:
      copies: k; 0 leaves scenes as they are.
      preprocess: of the images that come out.

    Raises:
      UserError: a negative number of copies.
    """

    copies: int
    preprocess: Preprocess

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise UserError(f"--augment: {self.copies} is negative")

    @property
    def source_preprocess(self) -> Preprocess:
        """What the source's images must be made by."""
        if not self.copies:
            return self.preprocess
        side = round(_LARGER * self.preprocess.resolution)
        return dataclasses.replace(self.preprocess, resolution=max(side, self.preprocess.resolution + 1))

    def __call__(self, scene: SceneImages, codecs: Mapping[str, Codec]) -> Iterator[SceneImages]:
        """The scene's copies, `key#0` … of its group; the scene itself where there are none to make.

        Args:
          scene: images [T, S, side, side, 3] by `source_preprocess`.
          codecs: of its streams.
        """
        if not self.copies:
            yield scene
            return
        side, R = scene.images.shape[2], self.preprocess.resolution
        for number in range(self.copies):
            info = dataclasses.replace(scene.info, key=f"{scene.info.key}#{number}")
            rng = np.random.default_rng(split.content_hash(info.key.encode()))
            top, left = rng.integers(0, side - R, 2, endpoint=True)
            images = scene.images[:, :, top : top + R, left : left + R]  # [T, S, R, R, 3]
            if rng.random() < 0.5:
                images = mirror_images(images, [codecs[stream] for stream in info.streams])
            yield SceneImages(info, images)


def mirror_images(images: np.ndarray, codecs: list[Codec]) -> np.ndarray:
    """A scene's images uint8 [T, S, R, R, 3], of streams with these codecs, as a mirror shows them."""
    return np.stack(
        [np.stack([codec.mirror(x) for codec, x in zip(codecs, frame, strict=True)]) for frame in images]
    )
