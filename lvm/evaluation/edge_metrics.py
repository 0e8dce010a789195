"""Edge detection metrics of the Berkeley benchmark (Arbeláez et al., PAMI 2011): ODS and OIS F-measure.

A predicted map is thresholded and thinned at each threshold; its pixels are matched one to one with those of the true
edges within a tolerance. The benchmark's matching also minimizes the distances of the pairs; their number, all that
counts here, is that of a maximum matching.
"""

import numpy as np
import scipy.sparse
import scipy.spatial
import skimage.morphology
from jaxtyping import Bool, Float, Int, Shaped

THRESHOLDS = 99  # k / 100, as in the benchmark
TRUE_STRENGTH = 0.5  # of true edges, the least
TOLERANCE = 0.0075  # of the diagonal
Counts = Int[np.ndarray, "T 4"]  # matched predicted, predicted, matched true, true pixels at each threshold


def count_matches(
    predicted: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], tolerance: float = TOLERANCE
) -> int:
    """Pixels in a maximum one-to-one matching of two edge maps, within `tolerance` × the diagonal."""
    first, second = np.argwhere(predicted), np.argwhere(truth)
    if not len(first) or not len(second):
        return 0
    distance = tolerance * float(np.hypot(*truth.shape))
    near = scipy.spatial.KDTree(first).sparse_distance_matrix(
        scipy.spatial.KDTree(second), distance, output_type="coo_matrix"
    )
    # Distances of 0 are entries as well: a matching looks at the structure alone.
    graph = scipy.sparse.csr_matrix((np.ones(len(near.row), np.int8), (near.row, near.col)), near.shape)
    return int(np.count_nonzero(scipy.sparse.csgraph.maximum_bipartite_matching(graph, perm_type="column") >= 0))


def edge_counts(
    strength: Float[np.ndarray, "H W"],
    truth: Bool[np.ndarray, "H W"],
    thresholds: int = THRESHOLDS,
    tolerance: float = TOLERANCE,
) -> Counts:
    """Counts of a predicted edge map, strength in [0, 1], against thinned true edges, at equidistant thresholds."""
    counts = np.zeros((thresholds, 4), np.int64)
    num_true, previous = np.count_nonzero(truth), None
    for index, threshold in enumerate(np.arange(1, thresholds + 1) / (thresholds + 1)):
        mask = strength >= threshold
        if previous is not None and np.count_nonzero(mask) == previous:  # masks shrink: equal counts are equal masks
            counts[index] = counts[index - 1]
            continue
        previous = np.count_nonzero(mask)
        thinned = skimage.morphology.thin(mask)
        matched = count_matches(thinned, truth, tolerance)
        counts[index] = matched, np.count_nonzero(thinned), matched, num_true
    return counts


def true_edges(strength: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Thinned edges of a true map, strength in [0, 1]: lines are rendered more than one pixel wide."""
    return skimage.morphology.thin(strength >= TRUE_STRENGTH)


def f_measure(counts: Shaped[np.ndarray, "*T 4"]) -> Float[np.ndarray, "*T"]:
    """F-measure of counts or means of them; 0 where nothing is predicted or nothing is there, as in the benchmark."""
    matched_predicted, predicted, matched_true, true = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision = matched_predicted / np.where(predicted > 0, predicted, 1)
    recall = matched_true / np.where(true > 0, true, 1)
    total = precision + recall
    return np.asarray(2 * precision * recall / np.where(total > 0, total, 1))


def ods(counts: Shaped[np.ndarray, "*n T 4"]) -> Float[np.ndarray, "*n"]:
    """F-measure of summed counts at the best threshold for all images (optimal dataset scale)."""
    return np.asarray(f_measure(counts).max(-1))


def ois(counts: Shaped[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n"]:
    """F-measure of summed counts, each image's at its own best threshold (optimal image scale)."""
    return f_measure(counts)


def best_counts(counts: Counts) -> Int[np.ndarray, "4"]:
    """Counts of an image at its best threshold, for `ois`."""
    return counts[int(f_measure(counts).argmax())]
