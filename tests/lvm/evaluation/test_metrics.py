"""Metrics against values worked out by hand."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common import statistics
from lvm.evaluation import metrics
from lvm.evaluation.edge_metrics import ods, ois


def test_iou_of_known_masks():
    masks = np.array([[[1, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], bool)
    truth = np.array([[[0, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], bool)
    np.testing.assert_allclose(metrics.iou(masks, truth), [1 / 3, 1, 1, 0])


def test_class_counts_leave_ignored_pixels_out():
    truth = np.array([[0, 0, 1], [2, 2, 2]], np.uint8)
    labels = np.array([[0, 1, 1], [2, 0, 1]], np.uint8)
    assert metrics.class_counts(labels, truth, 3).tolist() == [[1, 2, 2], [1, 1, 3], [1, 3, 1]]
    assert metrics.class_counts(labels, truth, 3, ignore=2).tolist() == [[1, 2, 1], [1, 1, 2], [0, 0, 0]]


def test_mean_iou_averages_classes_in_the_truth():
    counts = np.array([[5, 6, 7], [2, 5, 3], [0, 0, 1]])  # class 2 is answered, but absent from the truth
    first, second = 5 / (6 + 7 - 5), 2 / (5 + 3 - 2)
    assert metrics.mean_iou(counts) == pytest.approx((first + second) / 2)
    assert metrics.mean_iou(counts, exclude=[0]) == pytest.approx(second)
    assert np.isnan(metrics.mean_iou(counts, exclude=[0, 1]))


def test_conditional_entropy_of_known_pairs():
    given_codes = np.array([[0, 0, 0, 0], [1, 1, 2, 2]])
    codes = np.array([[0, 1, 2, 3], [5, 5, 0, 1]])
    # After 0 four codes are uniform (ln 4), after 1 one is certain, after 2 two are uniform (ln 2).
    expected = 4 / 8 * np.log(4) + 2 / 8 * 0 + 2 / 8 * np.log(2)
    assert metrics.conditional_entropy(given_codes, codes, 6) == pytest.approx(expected)


@given(hnp.arrays(np.uint16, (2, 50), elements=st.integers(0, 7)))
def test_conditioning_never_raises_entropy(pair):
    conditional = metrics.conditional_entropy(pair[0], pair[1], 8)
    assert -1e-9 <= conditional <= statistics.entropy(np.bincount(pair[1])) + 1e-9


def test_depth_errors_of_known_maps():
    truth = np.array([[[1.0, 2.0], [4.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]])
    depth = np.array([[[1.0, 2.2], [6.0, 9.0]], [[1.0, 5.0], [5.0, 5.0]]])
    errors = metrics.depth_errors(depth, truth)
    np.testing.assert_allclose(errors["rmse"], [np.sqrt((0.04 + 4) / 3), 1])
    np.testing.assert_allclose(errors["abs_rel"], [(0.1 + 0.5) / 3, 0.5])
    np.testing.assert_allclose(errors["delta1"], [2 / 3, 0])


def test_depth_errors_after_median_scaling():
    truth = np.array([[[1.0, 2.0, 4.0, 0.0]]])
    scaled = metrics.depth_errors(3 * truth, truth, scaled=True)
    assert [values.item() for values in scaled.values()] == pytest.approx([0, 0, 1])
    assert metrics.depth_errors(3 * truth, truth)["delta1"].item() == 0
    # Medians are of valid pixels: 2 of the truth, 1 of the prediction.
    uneven = metrics.depth_errors(np.array([[[1.0, 1.0, 2.0, 9.0]]]), truth, scaled=True)
    assert uneven["abs_rel"].item() == pytest.approx((1 + 0 + 0) / 3)
    nothing = metrics.depth_errors(np.zeros_like(truth), truth, scaled=True)
    assert nothing["abs_rel"].item() == pytest.approx(0.999)


def test_a_missing_depth_is_a_wrong_answer():
    truth = np.full((1, 2, 2), 2.0)
    assert [x.item() for x in metrics.depth_errors(truth, truth).values()] == [0, 0, 1]
    nothing = metrics.depth_errors(np.zeros_like(truth), truth)
    assert nothing["abs_rel"].item() == pytest.approx(0.999)
    assert nothing["delta1"].item() == 0


def test_depth_without_any_reading_has_no_value():
    truth = np.array([[[0.0]], [[2.0]]])
    np.testing.assert_allclose(metrics.depth_errors(np.array([[[7.0]], [[3.0]]]), truth)["rmse"], [np.nan, 1.0])


def test_foreground_counts_void_as_background():
    labels = np.array([[0, 1, 255]])
    assert metrics.foreground(labels, 0).tolist() == [[False, True, True]]
    assert metrics.foreground(labels, 0, 255).tolist() == [[False, True, False]]


def test_mean_of_ratios_leaves_out_absent_classes():
    assert metrics.mean_of_ratios(np.array([[1, 2], [0, 0], [3, 4]])) == pytest.approx(0.625)
    assert np.isnan(metrics.mean_of_ratios(np.zeros((2, 2))))


def test_accuracy_of_all_void_is_nan():
    assert np.isnan(metrics.accuracy(np.zeros((2, 3), int)))


def test_class_counts_and_mean_iou_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 5, (2, 3, 40, 40))
    counts = metrics.class_counts(labels, truth, 5)
    matrix = sklearn.metrics.confusion_matrix(truth.ravel(), labels.ravel())
    np.testing.assert_array_equal(counts, np.stack([np.diag(matrix), matrix.sum(1), matrix.sum(0)], axis=1))
    expected = sklearn.metrics.jaccard_score(truth.ravel(), labels.ravel(), average="macro")
    assert metrics.mean_iou(counts) == pytest.approx(expected)
    without = sklearn.metrics.jaccard_score(truth.ravel(), labels.ravel(), average="macro", labels=[1, 2, 3, 4])
    assert metrics.mean_iou(counts, exclude=[0]) == pytest.approx(without)
    assert metrics.accuracy(counts) == pytest.approx(sklearn.metrics.accuracy_score(truth.ravel(), labels.ravel()))


@pytest.mark.parametrize("aggregate", [metrics.mean_iou, metrics.accuracy, metrics.mean_of_ratios, ods, ois])
def test_aggregates_of_many_are_those_of_each(aggregate):
    """Bootstrap resamples are aggregated at once; some lack a class, one has nothing."""
    columns = {metrics.mean_of_ratios: 2, ods: 4, ois: 4}.get(aggregate, 3)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (40, 4, columns)).cumsum(-1) * rng.integers(0, 2, (40, 4, 1))
    counts[0] = 0
    np.testing.assert_allclose(aggregate(counts), np.stack([aggregate(x) for x in counts]))
