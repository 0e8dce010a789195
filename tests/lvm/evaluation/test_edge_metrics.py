"""ODS and OIS against cases worked out by hand and matchings of scipy's assignment solver."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.evaluation import edge_metrics
from lvm.evaluation.edge_metrics import best_counts, count_matches, edge_counts, f_measure, ods, ois

MASKS = hnp.arrays(bool, (7, 7), elements=st.booleans())


def column(position, shape=(20, 20), strength=1.0):
    edges = np.zeros(shape)
    edges[:, position] = strength
    return edges


@settings(max_examples=40)
@given(MASKS, MASKS)
def test_count_matches_equals_an_assignment(predicted, truth):
    distance = 0.25 * np.hypot(7, 7)
    first, second = np.argwhere(predicted), np.argwhere(truth)
    is_near = np.linalg.norm(first[:, None] - second, axis=-1) <= distance
    rows, columns = scipy.optimize.linear_sum_assignment(is_near, maximize=True)
    assert count_matches(predicted, truth, 0.25) == is_near[rows, columns].sum()


def test_count_matches_is_one_to_one_within_the_tolerance():
    truth = np.zeros((30, 40), bool)  # its diagonal is 50
    truth[10, 10] = True
    predicted = np.zeros_like(truth)
    predicted[10, 11:13] = True
    assert count_matches(predicted, truth, 1 / 50) == 1
    assert count_matches(predicted, truth, 0.9 / 50) == 0
    assert count_matches(truth, truth, 1e-9) == 1


def test_counts_of_a_perfect_map():
    counts = edge_counts(column(5), column(5) > 0, thresholds=3)
    assert counts.tolist() == [[20, 20, 20, 20]] * 3
    assert ods(counts) == ois(best_counts(counts)) == 1.0


def test_counts_follow_the_thresholds():
    """A true line of strength 0.6 and a false one of 0.3: best above 0.3."""
    counts = edge_counts(column(3, strength=0.6) + column(15, strength=0.3), column(3) > 0, thresholds=9)
    assert counts[2].tolist() == [20, 40, 20, 20]  # threshold 0.3
    assert counts[3].tolist() == [20, 20, 20, 20]
    assert counts[6].tolist() == [0, 0, 0, 20]
    assert f_measure(counts[2]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert ods(counts) == 1.0


def test_thick_lines_are_thinned():
    thick = column(4) + column(5) + column(6)
    assert edge_counts(thick, edge_metrics.true_edges(thick), 1).tolist()[0][0] >= 18
    assert np.count_nonzero(edge_metrics.true_edges(thick)) <= 20
    assert not edge_metrics.true_edges(0.49 * thick).any()


def test_ois_takes_the_best_of_each_image_and_ods_one_for_all():
    faint = edge_counts(column(3, strength=0.3) + column(9, strength=0.1), column(3) > 0, 9)
    strong = edge_counts(column(3, strength=0.9) + column(9, strength=0.5), column(3) > 0, 9)
    counts = np.stack([faint, strong])
    assert ois(np.stack([best_counts(x) for x in counts]).mean(0)) == 1.0
    # At 0.2 or 0.3: matched 40 of 60 predicted and of 40 true.
    assert ods(counts.mean(0)) == pytest.approx(2 * (2 / 3) / (5 / 3))


def test_empty_maps_score_zero():
    """Nothing predicted, nothing there: 0, as the benchmark's code defines it."""
    empty, line = np.zeros((20, 20)), column(3)
    for strength, truth in ((empty, line > 0), (line, empty > 0), (empty, empty > 0)):
        assert ods(edge_counts(strength, truth, 5)) == 0.0
    one = np.zeros((20, 20))
    one[7, 7] = 1
    assert ods(edge_counts(one, one > 0, 5)) == 1.0
