"""Vector quantization: nearest codes, moving averages, and usage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer import quantizers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("chunk", [4, 7, 64, 100, 2048])  # dividing the codebook, not dividing it, beyond it
def test_nearest_codes_equal_brute_force(chunk):
    latents, codebook = normal(3, 5, 4), normal(64, 4, seed=1)
    distances = np.square(latents[..., None, :].astype(np.float64) - codebook).sum(-1)  # [3, 5, 64]
    codes = quantizers.nearest_codes(jnp.asarray(latents), jnp.asarray(codebook), chunk)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, distances.argmin(-1))


@pytest.mark.parametrize("chunk", [2, 2048])
def test_nearest_codes_break_ties_to_the_lowest(chunk):
    codebook = jnp.ones((7, 3))
    np.testing.assert_array_equal(quantizers.nearest_codes(jnp.ones((2, 3)), codebook, chunk), [0, 0])


def test_lookup_inverts_nearest_codes():
    codebook = jnp.asarray(normal(16, 4))
    codes = jnp.array([[3, 0], [15, 7]])
    rows = quantizers.lookup(codes, codebook)
    np.testing.assert_array_equal(rows, np.asarray(codebook)[np.asarray(codes)])
    np.testing.assert_array_equal(quantizers.nearest_codes(rows, codebook), codes)


def test_straight_through_value_and_gradient():
    latents, quantized = jnp.asarray(normal(5)), jnp.asarray(normal(5, seed=1))
    value, pullback = jax.vjp(quantizers.straight_through, latents, quantized)
    np.testing.assert_allclose(value, quantized, rtol=1e-6)
    to_latents, to_quantized = pullback(jnp.full(5, 2.0))
    np.testing.assert_array_equal(to_latents, 2.0)
    np.testing.assert_array_equal(to_quantized, 0.0)


def test_update_codebook_by_hand():
    codebook, latents = normal(4, 2), normal(6, 2, seed=1)
    codes = np.array([0, 0, 2, 3, 3, 3])
    averages = {"counts": jnp.array([1.0, 2.0, 3.0, 4.0]), "sums": jnp.asarray(codebook)}
    averages, updated = quantizers.update_codebook(
        averages, jnp.asarray(latents), jnp.asarray(codes), jax.random.key(0),
        decay=0.9, dead_below=0.0, l2_normalize=False,
    )  # fmt: skip
    counts = 0.9 * np.array([1, 2, 3, 4]) + 0.1 * np.array([2, 0, 1, 3])
    batch_sums = np.stack([latents[:2].sum(0), np.zeros(2), latents[2], latents[3:].sum(0)])
    sums = 0.9 * codebook + 0.1 * batch_sums
    np.testing.assert_allclose(averages["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(averages["sums"], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updated, sums / counts[:, None], rtol=1e-5, atol=1e-6)


def test_update_codebook_resets_dead_codes_to_latents():
    codebook, latents = jnp.asarray(normal(8, 2)), jnp.asarray(normal(32, 2, seed=1))
    averages = {"counts": jnp.array([1.0] * 6 + [0.01] * 2), "sums": codebook}
    averages, updated = quantizers.update_codebook(
        averages, latents, jnp.zeros(32, jnp.int32), jax.random.key(0),
        decay=0.9, dead_below=0.1, l2_normalize=False,
    )  # fmt: skip
    rows = {tuple(row) for row in np.asarray(latents).tolist()}
    assert [tuple(row) in rows for row in np.asarray(updated).tolist()] == [False] * 6 + [True] * 2
    np.testing.assert_array_equal(averages["counts"][6:], 1.0)


def test_update_codebook_keeps_unit_length():
    latents = quantizers.normalize(jnp.asarray(normal(32, 3)))
    codebook = quantizers.sample_latents(latents, 8, jax.random.key(0))
    _, updated = quantizers.update_codebook(
        quantizers.init_moving_averages(codebook), latents, quantizers.nearest_codes(latents, codebook),
        jax.random.key(1), decay=0.5, dead_below=0.1, l2_normalize=True,
    )  # fmt: skip
    np.testing.assert_allclose(jnp.linalg.norm(updated, axis=-1), 1.0, atol=1e-6)


def test_sample_latents_repeats_only_when_too_few():
    latents = jnp.arange(6.0)[:, None]
    assert len(np.unique(quantizers.sample_latents(latents, 6, jax.random.key(0)))) == 6
    assert quantizers.sample_latents(latents, 15, jax.random.key(0)).shape == (15, 1)
    assert len(np.unique(quantizers.sample_latents(latents, 15, jax.random.key(0)))) == 6


def test_histogram_and_usage():
    counts = quantizers.histogram(jnp.array([[0, 0], [1, 1]]), 8)
    np.testing.assert_array_equal(counts, [2, 2, 0, 0, 0, 0, 0, 0])
    assert quantizers.usage(counts) == 0.25


def test_normalize_keeps_zero():
    np.testing.assert_array_equal(quantizers.normalize(jnp.zeros((2, 4))), 0.0)
