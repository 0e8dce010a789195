"""PSNR, entropy and perplexity against values worked by hand, or by scipy, for NumPy and under `jax.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common import statistics


def test_psnr_of_known_errors():
    targets = np.zeros((3, 2, 2, 3), np.uint8)
    images = targets.copy()
    images[0] = 51  # a fifth of the range: 20·log10(5) dB
    images[1, 0, 0] = 255  # a quarter of the pixels all wrong
    expected = [13.9794, 6.0206, 100.0]
    np.testing.assert_allclose(statistics.psnr(images, targets), expected, atol=1e-4)
    on_device = jax.jit(statistics.psnr)(jnp.asarray(images), jnp.asarray(targets))
    np.testing.assert_allclose(on_device, expected, atol=1e-4)


def test_psnr_clips_float_images():
    images, targets = jnp.zeros((2, 2, 2, 1)), jnp.array([1.0, 0.0, 0.0, 0.0] * 2).reshape(2, 2, 2, 1)
    np.testing.assert_allclose(statistics.psnr(images, targets), [6.0206, 6.0206], rtol=1e-4)
    np.testing.assert_allclose(statistics.psnr(images - 1.0, targets), [6.0206, 6.0206], rtol=1e-4)


@given(hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 1000)).filter(np.any))
def test_entropy_matches_scipy(counts):
    assert statistics.entropy(counts) == pytest.approx(scipy.stats.entropy(counts), abs=1e-9)


def test_perplexity_under_jit():
    perplexity = jax.jit(statistics.perplexity)
    np.testing.assert_allclose(perplexity(jnp.array([2.0, 2.0] + [0.0] * 6)), 2.0, rtol=1e-6)
    np.testing.assert_allclose(perplexity(jnp.ones(8)), 8.0, rtol=1e-6)
    assert perplexity(jnp.zeros(8)) == 1.0
