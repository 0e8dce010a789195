"""Colorization by example pairs: mean squared error in both definitions in use, PSNR, SSIM and LPIPS."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.streams.codecs import Codec
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.figures import Metric, Published
from lvm.evaluation.prompted import PromptedTask, Statistics

_IMAGENET_STD = np.array([0.229, 0.224, 0.225])


@dataclasses.dataclass(frozen=True)
class Colorization(PromptedTask):
    """Color from luma.

    `mse_imagenet` is the mean squared error of pixels normalized by ImageNet's mean and standard deviation, as in
    visual prompting (github.com/amirbar/visual_prompting); `mse_pixels` is LVM's (github.com/ytongbai/LVM): of pixels
    in [0, 1], summed over channels.
    """

    kind = "colorization"
    image_metrics = ("psnr", "ssim", "lpips")

    input: str = "gray"
    target: str = "rgb"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        return [
            Metric("mse_imagenet", "MSE of ImageNet-normalized pixels, as in visual prompting", "", False,
                   published=Published(0.51, "LVM on ImageNet")),
            Metric("mse_pixels", "MSE of pixels in [0, 1], summed over channels, as LVM's script has it", "", False),
        ]  # fmt: skip

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        pairs = zip(images, truth, strict=True)
        errors = np.stack([np.mean((a.astype(np.float64) - b) ** 2, axis=(0, 1)) for a, b in pairs]) / 255**2  # [B, 3]
        return {
            "mse_imagenet": np.mean(errors / _IMAGENET_STD**2, axis=1),
            "mse_pixels": errors.sum(1),
        }
