"""Metrics of images, labels, depth and codes, over NumPy arrays. PSNR and entropy are in `lvm.common.statistics`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from lvm.common import statistics

Codes = Integer[np.ndarray, "*shape"]  # codes or class ids
Confusion = Int[np.ndarray, "C C"]  # counts [true class, predicted class]


def iou(masks: Bool[np.ndarray, "B H W"], truth: Bool[np.ndarray, "B H W"]) -> Float[np.ndarray, " B"]:
    """Intersection over union of each pair of masks; two empty masks give 1."""
    union = np.count_nonzero(masks | truth, axis=(1, 2))
    intersection = np.count_nonzero(masks & truth, axis=(1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def confusion(labels: Codes, truth: Codes, num_classes: int, ignore: int | None = None) -> Confusion:
    """Confusion matrix over all pixels except those whose truth is `ignore`."""
    mask = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    pairs = truth[mask].astype(np.int64) * num_classes + labels[mask]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(counts: Confusion) -> float:
    """Share of correct pixels in a confusion matrix."""
    return float(np.trace(counts) / counts.sum())


def mean_iou(counts: Confusion, exclude: Sequence[int] = ()) -> float:
    """Mean IoU from a confusion matrix, over the classes present in the truth except `exclude`; NaN without any."""
    intersection = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - intersection
    present = counts.sum(1) > 0
    present[list(exclude)] = False
    return float(np.mean(intersection[present] / union[present])) if present.any() else float("nan")


def conditional_entropy(context: Codes, codes: Codes, num_codes: int, corrected: bool = False) -> float:
    """H(code | context code) in nats, from co-occurrence counts.

    The plug-in estimate is biased low for small samples, which makes it a stricter bound to beat. `corrected` adds the
    first-order bias term (Miller, "Note on the bias of information estimates", 1955).
    """
    joint = np.bincount(context.ravel().astype(np.int64) * num_codes + codes.ravel(), minlength=num_codes**2)
    marginal = np.bincount(context.ravel(), minlength=num_codes)
    estimate = float(statistics.entropy(joint) - statistics.entropy(marginal))
    if corrected:
        estimate += (np.count_nonzero(joint) - np.count_nonzero(marginal)) / (2 * codes.size)
    return estimate


def bootstrap(values: Float[np.ndarray, " n"], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile-bootstrap confidence interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def depth_errors(depth: Float[np.ndarray, "B H W"], truth: Float[np.ndarray, "B H W"]) -> dict[str, float]:
    """RMSE (in the unit of depth), AbsRel and δ1 per image over valid pixels, then averaged over images.

    0 means no reading: such pixels of the truth are skipped, such predictions count as distance 0.
    """
    rmse, abs_rel, delta1 = [], [], []
    for predicted, expected in zip(depth, truth, strict=True):
        valid = expected > 0
        if not valid.any():
            continue
        expected = expected[valid]
        predicted = np.maximum(predicted[valid], 1e-3 * expected)
        rmse.append(np.sqrt(np.mean((predicted - expected) ** 2)))
        abs_rel.append(np.mean(np.abs(predicted - expected) / expected))
        delta1.append(np.mean(np.maximum(predicted / expected, expected / predicted) < 1.25))
    means = {"rmse": rmse, "abs_rel": abs_rel, "delta1": delta1}
    return {name: float(np.mean(values)) for name, values in means.items()}
