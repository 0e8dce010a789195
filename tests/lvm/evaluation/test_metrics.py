"""Metrics against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common import statistics
from lvm.evaluation import metrics


def test_iou_of_known_masks():
    masks = np.array([[[1, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], bool)
    truth = np.array([[[0, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], bool)
    np.testing.assert_allclose(metrics.iou(masks, truth), [1 / 3, 1, 1, 0])


def test_confusion_counts_and_ignores():
    truth = np.array([[0, 0, 1], [2, 2, 2]], np.uint8)
    labels = np.array([[0, 1, 1], [2, 0, 1]], np.uint8)
    assert metrics.confusion(labels, truth, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 1]]
    assert metrics.confusion(labels, truth, 3, ignore=2).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


@given(hnp.arrays(np.uint8, (2, 40), elements=st.integers(0, 200)))
def test_confusion_matches_a_loop(pair):
    labels, truth = pair
    counts = np.zeros((201, 201), int)
    for predicted, expected in zip(labels, truth, strict=True):
        counts[expected, predicted] += 1
    np.testing.assert_array_equal(metrics.confusion(labels, truth, 201), counts)


def test_mean_iou_averages_classes_in_the_truth():
    counts = np.array([[5, 1, 0], [2, 2, 1], [0, 0, 0]])  # class 2 is predicted, but absent from the truth
    first, second = 5 / (5 + 1 + 2), 2 / (2 + 3 + 1)
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


def test_bootstrap_interval_of_the_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = metrics.bootstrap(values)
    error = 1.96 * values.std() / np.sqrt(400)
    np.testing.assert_allclose([low, high], [values.mean() - error, values.mean() + error], atol=0.015)
    assert metrics.bootstrap(values) == (low, high)
    assert metrics.bootstrap(np.full(5, 0.25)) == (0.25, 0.25)


def test_depth_errors_of_known_maps():
    truth = np.array([[[1.0, 2.0], [4.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]])
    depth = np.array([[[1.0, 2.2], [6.0, 9.0]], [[1.0, 5.0], [5.0, 5.0]]])
    errors = metrics.depth_errors(depth, truth)
    assert errors["rmse"] == pytest.approx((np.sqrt((0.04 + 4) / 3) + 1) / 2)
    assert errors["abs_rel"] == pytest.approx(((0.1 + 0.5) / 3 + 0.5) / 2)
    assert errors["delta1"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_missing_answer_is_a_wrong_answer():
    truth = np.full((1, 2, 2), 2.0)
    perfect = {"rmse": 0.0, "abs_rel": 0.0, "delta1": 1.0}
    assert metrics.depth_errors(truth, truth) == perfect
    nothing = metrics.depth_errors(np.zeros_like(truth), truth)
    assert nothing["abs_rel"] == pytest.approx(0.999)
    assert nothing["delta1"] == 0


def test_an_image_without_any_reading_is_left_out():
    truth = np.array([[[0.0]], [[2.0]]])
    assert metrics.depth_errors(np.array([[[7.0]], [[3.0]]]), truth)["rmse"] == pytest.approx(1.0)
