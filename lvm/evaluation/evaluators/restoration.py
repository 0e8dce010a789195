"""Restoration by example pairs: inpainting, denoising, deraining, super-resolution; PSNR, SSIM and LPIPS."""

import dataclasses

from lvm.evaluation.prompted import PromptedTask


@dataclasses.dataclass(frozen=True)
class Restoration(PromptedTask):
    """An image from a degraded one: the input is "masked", "noisy", "rain", "low_light" or "low_resolution"."""

    kind = "restoration"
    image_metrics = ("psnr", "ssim", "lpips")

    input: str = "noisy"
    target: str = "rgb"
