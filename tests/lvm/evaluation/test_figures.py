"""Bootstrap intervals and the text of figures."""

import numpy as np
import pytest

from lvm.evaluation import metrics
from lvm.evaluation.figures import MIN_GROUPS, Estimate, Figure, Picture, Plot, estimate, format_count, format_value


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
    values = np.random.default_rng(2).random(12)
    indices = np.random.default_rng(0).integers(12, size=(2000, 12))
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
    values = np.random.default_rng(8).random(20)
    values[[3, 5, 11]] = np.nan
    result = estimate(values)
    assert result.value == pytest.approx(np.nanmean(values))
    indices = np.random.default_rng(0).integers(20, size=(2000, 20))
    np.testing.assert_allclose(result.resamples, np.nanmean(values[indices], axis=1))


@pytest.mark.parametrize("values", [np.zeros(0), np.array([np.nan, np.nan])])
def test_estimate_without_values_has_no_interval(values):
    result = estimate(values)
    assert np.isnan(result.value)
    assert result.interval is None


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (np.arange(9.0), None),
        (np.arange(90.0) % 9, np.repeat(np.arange(9), 10)),
        (np.where(np.arange(90) < 81, 4.0, np.nan), np.arange(90) // 9),  # the tenth has no value
        (np.full(9, 4.0), ["a"] * 9),
    ],
)
def test_estimate_of_few_groups_has_no_interval(values, groups):
    result = estimate(values, groups=groups)
    assert (result.value, result.interval) == (4.0, None)


def test_estimate_of_enough_groups_covers_the_truth():
    """Nine in ten intervals at the limit, and not those of the episodes, which a group shares."""
    rng = np.random.default_rng(9)
    samples = [np.repeat(rng.normal(1.0, 1.0, MIN_GROUPS), 5) for _ in range(120)]
    names = np.repeat(np.arange(MIN_GROUPS), 5)
    covered = [[low <= 1.0 <= high for low, high in (estimate(x, groups=g).interval for x in samples)]
               for g in (names, None)]  # fmt: skip
    assert np.mean(covered[0]) >= 0.82
    assert np.mean(covered[1]) < 0.7


def test_estimate_resamples_groups_of_episodes_together():
    """Copies of the same ten episodes tell no more than these."""
    values = np.random.default_rng(6).random(20)
    names = [f"scene {i:02}" for i in range(20)]
    once, copied = estimate(values), estimate(np.repeat(values, 9), groups=np.repeat(names, 9))
    assert copied.value == pytest.approx(once.value)
    np.testing.assert_allclose(copied.resamples, once.resamples)
    assert np.diff(estimate(np.repeat(values, 9)).interval) < 0.5 * np.diff(once.interval)


def test_estimate_weighs_groups_by_their_episodes_with_a_value():
    sizes = np.array([1, 2, 0, 3, 1, 1, 2, 1, 4, 1, 1])  # of groups 0 to 10, besides one episode without a value each
    groups = np.concatenate([np.arange(11)[::-1], np.repeat(np.arange(11), sizes)]).astype(np.uint64)
    values = np.concatenate([np.full(11, np.nan), np.random.default_rng(7).random(sizes.sum())])
    result = estimate(values, groups=groups)
    assert result.value == pytest.approx(np.nanmean(values))
    chosen = np.random.default_rng(0).integers(11, size=(2000, 11))
    sums = np.array([np.nansum(values[groups == i]) for i in range(11)])
    np.testing.assert_allclose(result.resamples, sums[chosen].sum(1) / sizes[chosen].sum(1))


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["a", "b"], "2 queries"),
        (np.array([5, 6, 5], np.uint64), "3 queries of 2 originals"),
        (["a", "a"], "2 queries of one original"),
    ],
)
def test_format_count_names_originals_if_they_are_fewer(groups, text):
    assert format_count("queries", groups) == text


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
    result, baseline = Estimate(0.5, np.linspace(0, 1, 41)), estimate(np.zeros(10))
    figure = Figure("iou", result, "IoU", "", True, {"copied": baseline, "entropy": Estimate(2.0)}, baseline)
    content = figure.to_json()
    assert (content["value"], content["interval"]) == (0.5, pytest.approx([0.025, 0.975]))
    assert content["baselines"] == {"copied": {"value": 0.0, "interval": [0.0, 0.0]}, "entropy": {"value": 2.0}}
    assert content["ceiling"]["value"] == 0.0
    assert "published" not in content
    assert figure.resamples().keys() == {"iou", "iou|copied", "iou|ceiling"}


def test_picture_name_is_a_file_name():
    assert Picture("Video, continued", "", Plot({}, "x", "y")).name == "video-continued"
