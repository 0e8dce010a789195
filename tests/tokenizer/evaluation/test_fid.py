"""Fréchet distances against their definition, and statistics that are added to and stored."""

import numpy as np
import pytest
import scipy.linalg

from lvm.common.errors import UserError
from tokenizer.evaluation.fid import FeatureStatistics, frechet_distance


def features(count, seed, dim=6):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + rng.random(dim)).astype(np.float32)


def statistics_of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.add(batch)
    return statistics


def test_statistics_equal_numpy_in_any_batches():
    x = features(50, 0)
    for batches in ([x], np.split(x, [7, 30])):
        statistics = statistics_of(*batches)
        np.testing.assert_allclose(statistics.mean, x.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_distance_equals_clean_fids_formula():
    a, b = statistics_of(features(200, 0)), statistics_of(features(150, 1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_of_fewer_images_than_features():
    """Equal data shifted by d along each axis has distance 6 d²; scipy's root of a singular product is not exact."""
    x = features(3, 0)
    assert frechet_distance(statistics_of(x), statistics_of(x + 2)) == pytest.approx(6 * 4, rel=1e-6)
    assert np.isnan(frechet_distance(statistics_of(x), statistics_of(x[:1])))


def test_statistics_are_stored(tmp_path):
    statistics = statistics_of(features(5, 0))
    statistics.save(tmp_path / "x.npz")
    loaded = FeatureStatistics.load(tmp_path / "x.npz")
    assert loaded.count == 5
    np.testing.assert_array_equal(loaded.covariance, statistics.covariance)
    (tmp_path / "y.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"y\.npz: not statistics of features"):
        FeatureStatistics.load(tmp_path / "y.npz")
