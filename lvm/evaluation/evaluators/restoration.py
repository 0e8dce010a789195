"""Restoration by example pairs: inpainting, denoising, deraining, super-resolution; PSNR and SSIM."""

import dataclasses
from collections.abc import Sequence

from lvm.data.streams.codecs import Codec
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.prompted import Metric, PromptedTask, Statistics


@dataclasses.dataclass(frozen=True)
class Restoration(PromptedTask):
    """An image from a degraded one: the input is "masked", "noisy", "rain", "low_light" or "low_resolution"."""

    kind = "restoration"

    input: str = "noisy"
    target: str = "rgb"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        return [Metric("ssim", "SSIM, mean over queries")]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        return {"ssim": metrics.ssim(images, truth)}
