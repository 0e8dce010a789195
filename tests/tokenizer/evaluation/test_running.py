"""Means with intervals, extremes and a sample, of images that are seen once."""

import numpy as np
import pytest

from tokenizer.evaluation.running import BootstrapWeights, Examples, RunningMean


def test_running_mean_has_bootstrap_interval():
    values, weights, mean = np.random.default_rng(0).standard_normal(400), BootstrapWeights(), RunningMean()
    values[7] = np.nan
    for batch in np.split(values, [64, 100, 390]):
        mean.add(batch, weights.sample(len(batch)))
    estimate, valid = mean.estimate(), np.delete(values, 7)
    assert estimate.value == pytest.approx(valid.mean())
    error = valid.std() / np.sqrt(len(valid))
    assert estimate.interval == pytest.approx(
        (valid.mean() - 1.96 * error, valid.mean() + 1.96 * error), abs=0.2 * error
    )


def test_running_means_of_equal_images_are_paired():
    """A constant added to every image shifts every resample, whatever the batches."""
    values = np.random.default_rng(0).standard_normal(50)
    means = []
    for shift, splits in ((0, [10]), (3, [1, 2, 40])):
        weights, mean = BootstrapWeights(), RunningMean()
        for batch in np.split(values + shift, splits):
            mean.add(batch, weights.sample(len(batch)))
        means.append(mean.estimate().resamples)
    np.testing.assert_allclose(means[1] - means[0], 3, rtol=1e-9)


def test_running_mean_without_values_is_nan():
    mean = RunningMean()
    mean.add(np.array([np.nan]), BootstrapWeights().sample(1))
    assert np.isnan(mean.estimate().value)


def test_examples_are_extremes_and_uniform_sample():
    psnr = np.random.default_rng(0).permutation(300).astype(np.float64)
    images = np.arange(300).astype(np.uint8)[:, None, None, None].repeat(3, 3)
    sampled, fetched = [], []
    for _ in range(2):
        examples = Examples(3)
        for start in range(0, 300, 20):
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
    assert [example.key for example in examples.sample] == ["a", "b"]
