"""Metrics of an answer's pixels: PSNR, SSIM and, with weights, LPIPS."""

from collections.abc import Callable, Sequence

import numpy as np

from lvm.common import statistics
from lvm.evaluation import metrics
from lvm.evaluation.figures import Metric

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images [B, H, W, 3] and true ones → of each, [B]
PSNR = Metric("psnr", "PSNR of the answer's pixels", "dB")
SSIM = Metric("ssim", "SSIM")
LPIPS = Metric("lpips", "LPIPS of VGG16", "", False)


def image_metrics(
    lpips: Compare | None, names: Sequence[str] = ("psnr", "ssim", "lpips")
) -> list[tuple[Metric, Compare]]:
    """Metrics by name; LPIPS is left out where `lpips` is None."""
    compares = {PSNR: statistics.psnr, SSIM: metrics.ssim, LPIPS: lpips}
    return [(metric, compare) for metric, compare in compares.items() if compare is not None and metric.name in names]
