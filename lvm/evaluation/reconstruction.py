"""Reconstruction quality of a tokenizer."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lvm.common import statistics
from lvm.data.streams.codecs import Palette
from lvm.evaluation import metrics
from lvm.evaluation.heldout import Heldout


def reconstruction_metrics(
    heldout: Heldout, decode: Callable[[np.ndarray], np.ndarray], num_codes: int
) -> dict[str, Any]:
    """PSNR in dB of every stream, round trip of segmentations, and codebook usage and perplexity."""
    results: dict[str, Any] = {"psnr": {}}
    histogram = np.zeros(num_codes, np.int64)
    for stream, codec in heldout.codecs.items():
        if not heldout.with_streams([stream]):
            continue
        images, codes = heldout.images(stream), heldout.codes(stream)
        decoded = decode(codes)
        histogram += np.bincount(codes.ravel(), minlength=num_codes)
        results["psnr"][stream] = float(statistics.psnr(decoded, images).mean())
        if isinstance(codec, Palette):
            labels, truth = (np.stack([codec.parse(x) for x in batch]) for batch in (decoded, images))
            results["round_trip_pixel_accuracy"] = float(np.mean(labels == truth))
            if codec.background is not None:
                foreground_iou = metrics.iou(labels != codec.background, truth != codec.background)
                results["round_trip_foreground_iou"] = float(foreground_iou.mean())
    return results | {
        "num_codes_counted": int(histogram.sum()),
        "codebook_usage": float(np.count_nonzero(histogram) / num_codes),
        "codebook_perplexity": float(statistics.perplexity(histogram)),
    }
