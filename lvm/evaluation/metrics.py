"""Figures of images, labels and codes. Every function is over numpy arrays and says its unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image: two uint8 [B, H, W, 3] → float64 [B]."""
    error = (images.astype(np.float64) - truth) / 255
    return -10 * np.log10(np.maximum(np.mean(error**2, axis=(1, 2, 3)), 1e-10))


def iou(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of masks: two bool [B, H, W] → float64 [B]; two empty masks are 1."""
    union = np.count_nonzero(masks | truth, axis=(1, 2))
    shared = np.count_nonzero(masks & truth, axis=(1, 2))
    return np.where(union == 0, 1.0, shared / np.maximum(union, 1))


def confusion(
    labels: np.ndarray, truth: np.ndarray, num_classes: int, ignore: int | None = None
) -> np.ndarray:
    """Counts [true class, answered class] int64 [C, C] over all pixels but those whose truth is `ignore`."""
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    pairs = truth[counted].astype(np.int64) * num_classes + labels[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(counts: np.ndarray, leave_out: Sequence[int] = ()) -> float:
    """Class mean of intersection over union, from a confusion matrix, over the classes that occur in the truth."""
    shared = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - shared
    present = counts.sum(1) > 0
    present[list(leave_out)] = False
    return float(np.mean(shared[present] / union[present])) if present.any() else float("nan")


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts give (the plug-in estimate)."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))


def conditional_entropy(
    given: np.ndarray, codes: np.ndarray, num_codes: int, corrected: bool = False
) -> float:
    """H(code | given) in nats, from co-occurrence counts of two int arrays of one shape.

    The plug-in estimate is too low where samples are few, so beating it is never easier than beating the true
    value. `corrected` adds the first term of its bias (Miller, "Note on the bias of information estimates", 1955).
    """
    joint = np.bincount(given.ravel().astype(np.int64) * num_codes + codes.ravel(), minlength=num_codes**2)
    marginal = np.bincount(given.ravel(), minlength=num_codes)
    estimate = entropy(joint) - entropy(marginal)
    if corrected:
        estimate += (np.count_nonzero(joint) - np.count_nonzero(marginal)) / (2 * codes.size)
    return estimate


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` [n], by resampling with replacement (percentiles)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def depth_errors(depth: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """RMSE (in the unit of depth), AbsRel and δ1 of each image over pixels with a reading, then averaged.

    Args:
      depth, truth: float [B, H, W], 0 where there is no reading. Where the answer alone has none, it counts
        as zero distance.
    """
    rmse, relative, close = [], [], []
    for answer, right in zip(depth, truth, strict=True):
        known = right > 0
        if not known.any():
            continue
        answer, right = np.maximum(answer[known], 1e-3 * right[known]), right[known]
        rmse.append(np.sqrt(np.mean((answer - right) ** 2)))
        relative.append(np.mean(np.abs(answer - right) / right))
        close.append(np.mean(np.maximum(answer / right, right / answer) < 1.25))
    return {
        "rmse": float(np.mean(rmse)),
        "abs_rel": float(np.mean(relative)),
        "delta1": float(np.mean(close)),
    }
