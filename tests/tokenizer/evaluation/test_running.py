"""Means with intervals, extremes and a sample, of images that are seen once."""

import numpy as np
import pytest

from tokenizer.evaluation.running import Examples, RunningMean, bootstrap_weights


def names(count):
    return np.array([f"{i}" for i in range(count)])


def add(mean, values, groups, splits=()):
    for values, groups in zip(np.split(values, splits), np.split(groups, splits), strict=True):  # noqa: B020
        mean.add(values, bootstrap_weights(groups.tolist()))
    return mean.estimate()


def test_running_mean_has_bootstrap_interval():
    values = np.random.default_rng(0).standard_normal(400)
    values[7] = np.nan
    estimate, valid = add(RunningMean(), values, names(400), [64, 100, 390]), np.delete(values, 7)
    assert estimate.value == pytest.approx(valid.mean())
    error = valid.std() / np.sqrt(len(valid))
    assert estimate.interval == pytest.approx(
        (valid.mean() - 1.96 * error, valid.mean() + 1.96 * error), abs=0.2 * error
    )


def test_running_means_of_equal_images_are_paired():
    """A constant added to every image shifts every resample, whatever the batches and the order."""
    values, order = np.random.default_rng(0).standard_normal(50), np.random.default_rng(1).permutation(50)
    first = add(RunningMean(), values, names(50), [10])
    second = add(RunningMean(), values[order] + 3, names(50)[order], [1, 2, 40])
    np.testing.assert_allclose(second.resamples - first.resamples, 3, rtol=1e-9)


def test_running_mean_resamples_groups():
    """Equal frames of videos tell no more than one frame of each; a single video tells nothing of others."""
    values = np.random.default_rng(0).standard_normal(50)
    photos, frames = (add(RunningMean(), np.repeat(values, n), np.repeat(names(50), n)) for n in (1, 9))
    assert frames.interval == pytest.approx(photos.interval)
    alone = add(RunningMean(), values, np.repeat("video", 50))
    assert alone.value == pytest.approx(values.mean())
    assert alone.interval is None


def test_running_mean_without_values_is_nan():
    assert np.isnan(add(RunningMean(), np.array([np.nan]), names(1)).value)


def test_examples_are_extremes_and_uniform_sample():
    psnr = np.random.default_rng(0).permutation(300).astype(np.float64)
    images = np.arange(300).astype(np.uint8)[:, None, None, None].repeat(3, 3)
    sampled, fetched = [], []
    for starts in (range(0, 300, 20), reversed(range(0, 300, 20))):
        examples = Examples(3)
        for start in starts:
            rows = slice(start, start + 20)
            keys = [f"{i}" for i in range(start, start + 20)]
            fetch = lambda rows=rows: fetched.append(rows) or 1 + images[rows]  # noqa: E731
            examples.add("rgb", keys, psnr[rows], images[rows], fetch)
        assert [example.psnr for example in examples.best] == [299, 298, 297]
        assert [example.psnr for example in examples.worst] == [0, 1, 2]
        for example in (*examples.best, *examples.worst, *examples.sample):
            assert psnr[int(example.key)] == example.psnr
            np.testing.assert_array_equal(example.decoded, 1 + example.image)
        sampled.append([example.key for example in examples.sample])
    assert sampled[0] == sampled[1]
    assert len(set(sampled[0])) == 3
    assert len(fetched) < 2 * 15  # batches without an example stay on the device


def test_examples_fewer_than_their_number():
    examples = Examples(4)
    examples.add(
        "rgb",
        ["a", "b"],
        np.array([1.0, 2.0]),
        np.zeros((2, 1, 1, 3), np.uint8),
        lambda: np.zeros((2, 1, 1, 3), np.uint8),
    )
    assert [example.key for example in examples.best] == ["b", "a"]
    assert [example.key for example in examples.worst] == ["a", "b"]
    assert {example.key for example in examples.sample} == {"a", "b"}


def test_running_mean_of_few_groups_has_no_interval():
    for sizes, has_interval in (
        ([50] * 12, True),
        ([50] * 8, False),
        ([3] * 30 + [2000], False),
        ([1] * 90 + [5], True),
    ):
        groups = np.repeat([f"video {i}" for i in range(len(sizes))], sizes)
        result = add(RunningMean(), np.random.default_rng(0).random(len(groups)), groups)
        assert (result.interval is not None) == has_interval, sizes
