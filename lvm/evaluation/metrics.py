"""Metrics of images, labels, depth and codes, over NumPy arrays. PSNR and entropy are in `lvm.common.statistics`."""

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import scipy.optimize
import skimage.metrics
from jaxtyping import Bool, Float, Integer, Shaped, UInt8

from lvm.common import statistics

_SSIM_WINDOW = 11
Codes = Integer[np.ndarray, "*shape"]  # codes or class ids
ClassCounts = Shaped[np.ndarray, "*n C 3"]  # pixels of each class that are right, true and answered, or means of some


def iou(masks: Bool[np.ndarray, "B H W"], truth: Bool[np.ndarray, "B H W"]) -> Float[np.ndarray, " B"]:
    """Intersection over union of each pair of masks; two empty masks give 1."""
    union = np.count_nonzero(masks | truth, axis=(1, 2))
    intersection = np.count_nonzero(masks & truth, axis=(1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def class_counts(labels: Codes, truth: Codes, num_classes: int, ignore: int | None = None) -> ClassCounts:
    """Pixels of each class that are right, true and answered, [C, 3], but for those whose truth is `ignore`.

    All that accuracy and IoU need of a confusion matrix, whose size would be quadratic.
    """
    mask = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    kinds = (truth[mask & (labels == truth)], truth[mask], labels[mask])
    return np.stack([np.bincount(ids, minlength=num_classes) for ids in kinds], axis=-1)


def accuracy(counts: ClassCounts) -> Float[np.ndarray, "*n"]:
    """Share of correct pixels from counts, or means of some; NaN without any pixel."""
    correct, total = counts[..., 0].sum(-1), counts[..., 1].sum(-1)
    return np.where(total > 0, correct / np.where(total > 0, total, 1), np.nan)


def mean_iou(counts: ClassCounts, exclude: Sequence[int] = ()) -> Float[np.ndarray, "*n"]:
    """Mean IoU from counts, over the classes present in the truth except `exclude`; NaN without any."""
    right, true, answered = np.moveaxis(counts, -1, 0)
    present = true > 0
    present[..., list(exclude)] = False
    return _mean_of_ratios(right, true + answered - right, present)


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


def mean_of_ratios(sums: Shaped[np.ndarray, "*n C 2"]) -> Float[np.ndarray, "*n"]:
    """Mean of intersection / union over the classes that have a union; NaN without any."""
    return _mean_of_ratios(sums[..., 0], sums[..., 1], sums[..., 1] > 0)


def _mean_of_ratios(parts: np.ndarray, wholes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the last axis of parts / wholes where the mask is set; NaN where it is nowhere."""
    ratios, count = np.where(mask, parts / np.where(mask, wholes, 1), 0), mask.sum(-1)
    return np.where(count > 0, ratios.sum(-1) / np.maximum(count, 1), np.nan)


def foreground(labels: Codes, background: int, ignore: int | None = None) -> Bool[np.ndarray, "*shape"]:
    """Mask of the classes other than `background`; void pixels count as background, as in visual prompting."""
    mask = labels != background
    return mask if ignore is None else mask & (labels != ignore)


def depth_errors(
    depth: Float[np.ndarray, "B H W"], truth: Float[np.ndarray, "B H W"], scaled: bool = False
) -> dict[str, Float[np.ndarray, " B"]]:
    """RMSE (in the unit of depth), AbsRel and δ1 of each image over its valid pixels; NaN without any.

    0 means no reading: such pixels of the truth are skipped, such predictions count as distance 0.

    Args:
      depth: predictions.
      truth: of the same unit.
      scaled: predictions are first multiplied by the ratio of the medians over valid pixels (median scaling), as for
        models whose depth has no unit (Zhou et al., arXiv 1704.07813).
    """
    errors = np.full((3, len(depth)), np.nan)
    for index, (predicted, expected) in enumerate(zip(depth, truth, strict=True)):
        valid = expected > 0
        if not valid.any():
            continue
        expected = expected[valid].astype(np.float64)
        predicted = predicted[valid].astype(np.float64)
        if scaled and np.median(predicted) > 0:
            predicted = predicted * (np.median(expected) / np.median(predicted))
        predicted = np.maximum(predicted, 1e-3 * expected)
        ratio = np.maximum(predicted / expected, expected / predicted)
        errors[:, index] = (
            np.sqrt(np.mean((predicted - expected) ** 2)),
            np.mean(np.abs(predicted - expected) / expected),
            np.mean(ratio < 1.25),
        )
    return dict(zip(("rmse", "abs_rel", "delta1"), errors, strict=True))


def normal_errors(
    normals: Float[np.ndarray, "B H W 3"],
    truth: Float[np.ndarray, "B H W 3"],
    valid: Bool[np.ndarray, "B H W"],
    within: Sequence[float],
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, "A B"]]:
    """Mean angle in degrees between unit vectors over each image's valid pixels, and shares within some angles.

    NaN for an image without a valid pixel.
    """
    cosine = np.clip(np.sum(normals.astype(np.float64) * truth, axis=-1), -1, 1)
    angles = np.where(valid, np.degrees(np.arccos(cosine)), np.nan)
    count = valid.sum((1, 2))
    with np.errstate(invalid="ignore"):  # 0 / 0: no valid pixel
        mean = np.nansum(angles, axis=(1, 2)) / count
        shares = np.stack([np.sum(angles < limit, axis=(1, 2)) / count for limit in within])
    return mean, shares


def largest_box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int] | None:
    """Box (x0, y0, x1, y1) of the largest 4-connected region, its end exclusive; None of an empty mask."""
    regions, count = scipy.ndimage.label(mask)
    if not count:
        return None
    rows, columns = scipy.ndimage.find_objects(regions)[int(np.bincount(regions.ravel())[1:].argmax())]
    return columns.start, rows.start, columns.stop, rows.stop


def box_iou(box: tuple[int, int, int, int] | None, truth: tuple[int, int, int, int]) -> float:
    """IoU of two boxes (x0, y0, x1, y1) with exclusive ends; 0 for no box."""
    if box is None:
        return 0.0
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (box, truth)]
    return intersection / (sum(areas) - intersection)


def keypoint_shares(
    points: Sequence[Float[np.ndarray, "_ 2"]], truth: Sequence[Float[np.ndarray, "_ 2"]], alpha: float
) -> tuple[float, float]:
    """PCK and precision of an image.

    Args:
      points: answered positions (x, y) of each joint.
      truth: true ones.
      alpha: distance of a correct keypoint, a fraction of the longer side of the box around all true ones.

    Returns:
      The share of true keypoints that are matched, one to one, by an answer of the same joint, and the share of answers
      that are; NaN both if fewer than two true keypoints leave no size, the latter also without an answer.
    """
    every = np.concatenate([*truth, np.zeros((0, 2))])
    if len(every) < 2 or not (size := np.ptp(every, axis=0).max()):
        return float("nan"), float("nan")
    correct = 0
    for answers, expected in zip(points, truth, strict=True):
        is_near = np.linalg.norm(answers[:, None] - expected, axis=-1) <= alpha * size  # [answers, expected]
        rows, columns = scipy.optimize.linear_sum_assignment(is_near, maximize=True)
        correct += int(is_near[rows, columns].sum())
    num_answers = sum(map(len, points))
    return correct / len(every), correct / num_answers if num_answers else float("nan")


def ssim(images: UInt8[np.ndarray, "B H W 3"], truth: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, " B"]:
    """SSIM of each image with the settings of Wang et al. (2004), mean over channels.

    A window of 11 × 11 pixels, Gaussian with σ 1.5; NaN for images smaller than that.
    """
    if min(images.shape[1:3]) < _SSIM_WINDOW:
        return np.full(len(images), np.nan)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    pairs = zip(images, truth, strict=True)
    return np.array([skimage.metrics.structural_similarity(a, b, channel_axis=-1, **options) for a, b in pairs])
