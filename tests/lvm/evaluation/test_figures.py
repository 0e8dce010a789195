"""Bootstrap intervals and the text of figures."""

import numpy as np
import pytest

from lvm.evaluation import metrics
from lvm.evaluation.figures import Estimate, Figure, Picture, Plot, count_of, estimate, format_value


def test_estimate_has_the_interval_of_the_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    result = estimate(values)
    error = 1.96 * values.std() / np.sqrt(400)
    assert result.value == pytest.approx(values.mean())
    np.testing.assert_allclose(result.interval, [values.mean() - error, values.mean() + error], atol=0.015)
    assert estimate(values).interval == result.interval


def test_estimate_covers_the_truth_in_95_percent():
    rng = np.random.default_rng(1)
    intervals = [estimate(rng.exponential(1.0, 60)).interval for _ in range(120)]
    assert 0.87 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.99


def test_estimate_equals_resampling_one_by_one():
    values = np.random.default_rng(2).random(7)
    indices = np.random.default_rng(0).integers(7, size=(2000, 7))
    np.testing.assert_allclose(estimate(values).resamples, values[indices].mean(1))


def test_estimate_of_an_aggregate_of_counts():
    counts = np.random.default_rng(3).integers(1, 9, (30, 3, 3)).cumsum(-1)
    result = estimate(counts, metrics.mean_iou)
    assert result.value == pytest.approx(metrics.mean_iou(counts.sum(0)))
    indices = np.random.default_rng(0).integers(30, size=(2000, 30))
    expected = [metrics.mean_iou(counts[rows].sum(0)) for rows in indices[:20]]
    np.testing.assert_allclose(result.resamples[:20], expected)


def test_estimates_of_equal_episodes_are_paired():
    base = np.random.default_rng(4).normal(0, 5.0, 50)
    better = estimate(base + 0.5)
    assert np.ptp(better.resamples - estimate(base).resamples) < 1e-12


def test_estimate_leaves_out_episodes_without_a_value():
    result = estimate(np.array([1.0, np.nan, 3.0]))
    assert result.value == 2.0
    assert result.interval == (1.0, 3.0)


@pytest.mark.parametrize("values", [np.zeros(0), np.array([np.nan, np.nan])])
def test_estimate_without_values_has_no_interval(values):
    result = estimate(values)
    assert np.isnan(result.value)
    assert result.interval is None


@pytest.mark.parametrize("groups", [None, ["a", "a"]])
def test_estimate_of_a_single_group_has_no_interval(groups):
    result = estimate(np.array([0.25, 0.75])[: 2 if groups else 1], groups=groups)
    assert (result.value, result.interval) == (0.5 if groups else 0.25, None)


def test_estimate_resamples_groups_of_episodes_together():
    """Copies of the same ten episodes tell no more than these."""
    values = np.random.default_rng(6).random(10)
    names = [f"scene {i}" for i in range(10)]
    once, copied = estimate(values), estimate(np.repeat(values, 9), groups=np.repeat(names, 9))
    assert copied.value == pytest.approx(once.value)
    np.testing.assert_allclose(copied.resamples, once.resamples)
    assert np.diff(estimate(np.repeat(values, 9)).interval) < 0.5 * np.diff(once.interval)


def test_estimate_weighs_groups_by_their_episodes_with_a_value():
    values, groups = np.array([1.0, 1.0, 4.0, np.nan, np.nan]), np.array([7, 7, 3, 3, 9], np.uint64)
    result = estimate(values, groups=groups)
    assert result.value == 2.0
    chosen = np.random.default_rng(0).integers(3, size=(2000, 3))  # of the groups 3, 7, 9 in this order
    sums, sizes = np.array([4.0, 2.0, 0.0]), np.array([1, 2, 0])
    with np.errstate(invalid="ignore"):
        expected = sums[chosen].sum(1) / sizes[chosen].sum(1)
    np.testing.assert_allclose(result.resamples, expected)  # NaN where only 9 was drawn


@pytest.mark.parametrize(
    ("groups", "text"),
    [(["a", "b"], "2 queries"), (["a", "b", "a"], "3 queries of 2 originals"), (["a", "a"], "2 queries of 1 original")],
)
def test_count_of_names_originals_if_they_are_fewer(groups, text):
    assert count_of("queries", groups) == text


def test_estimate_in_chunks_equals_all_at_once(monkeypatch):
    values = np.random.default_rng(5).random((40, 6))
    mean = lambda x: x.sum(-1)  # noqa: E731
    expected = estimate(values, mean).resamples
    monkeypatch.setattr("lvm.evaluation.figures._CHUNK", 40 * 64)  # an even number of random words a row
    np.testing.assert_allclose(estimate(values, mean).resamples, expected)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.12345, "", "0.123"),
        (0.987, "%", "98.7%"),
        (23.456, "dB", "23.5 dB"),
        (321.4, "count", "321"),
        (11.26, "deg", "11.3°"),
        (0.22, "x", "0.22×"),
        (3.21, "nats", "3.210 nats"),
        (float("nan"), "dB", "–"),
        (None, "", "–"),
    ],
)
def test_format_value_has_units(value, unit, text):
    assert format_value(value, unit) == text


def test_figure_to_json_and_resamples():
    result, baseline = estimate(np.array([0.0, 1.0])), estimate(np.array([0.0, 0.0]))
    figure = Figure("iou", result, "IoU", "", True, {"copied": baseline, "entropy": Estimate(2.0)}, baseline)
    content = figure.to_json()
    assert (content["value"], content["interval"]) == (0.5, [0.0, 1.0])
    assert content["baselines"] == {"copied": {"value": 0.0, "interval": [0.0, 0.0]}, "entropy": {"value": 2.0}}
    assert content["ceiling"]["value"] == 0.0
    assert "published" not in content
    assert figure.resamples().keys() == {"iou", "iou|copied", "iou|ceiling"}


def test_picture_name_is_a_file_name():
    assert Picture("Video, continued", "", Plot({}, "x", "y")).name == "video-continued"
