"""MS-SSIM against scikit-image and its definition."""

import jax
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from tokenizer.losses.ssim import ms_ssim, num_scales, ssim_terms


def images(side, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.random((2, side // 8, side // 8, 3), np.float32).repeat(8, 1).repeat(8, 2)
    noisy = np.clip(smooth + 0.1 * rng.standard_normal(smooth.shape, np.float32), 0, 1)
    return noisy.astype(np.float32), smooth


def test_ssim_equals_scikit_image():
    x, y = images(32)
    terms = jax.jit(ssim_terms)(x, y)
    actual = np.asarray(terms[0] * terms[1]).mean((1, 2, 3))
    expected = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize(("side", "scales"), [(8, 0), (11, 1), (21, 1), (22, 2), (64, 3), (175, 4), (176, 5), (512, 5)])
def test_num_scales_fit_the_window(side, scales):
    assert num_scales(side) == scales


def test_ms_ssim_is_the_weighted_product_of_scales():
    x, y = images(48)
    halve = lambda z: z.reshape(2, z.shape[1] // 2, 2, z.shape[2] // 2, 2, 3).mean((2, 4))  # noqa: E731
    weights = np.array([0.0448, 0.2856, 0.3001])
    factors = []
    a, b = x, y
    for i in range(3):
        luminance, contrast = (np.asarray(term) for term in jax.jit(ssim_terms)(a, b))
        factors.append((luminance * contrast if i == 2 else contrast).mean((1, 2)))
        a, b = halve(a), halve(b)
    expected = np.prod([f**w for f, w in zip(factors, weights / weights.sum(), strict=True)], 0).mean()
    compiled = jax.jit(jax.value_and_grad(ms_ssim))
    value, gradient = compiled(x, y)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(compiled(y, y)[0], 1.0, rtol=1e-5)
    _, gradient = compiled(1 - y, y)  # whose structure is negative
    assert np.isfinite(gradient).all()
