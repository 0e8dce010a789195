"""Usage and perplexity over a sliding window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.code_usage import expected_of_uniform, init_window, update_window, usage, window_metrics


def test_window_holds_the_latest_codes():
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 50, (40, 4))
    window, update = init_window(50), jax.jit(functools.partial(update_window, window_size=50))
    for step, codes in enumerate(batches):
        window = update(window, jnp.asarray(codes), jnp.int32(step))  # two steps a slot
        held = np.concatenate(batches[max(0, (step // 2 - 7) * 2) : step + 1], None)
        assert step < 14 or 50 <= len(held) <= 64
        counts = np.bincount(held, minlength=50)
        np.testing.assert_array_equal(np.asarray(window["counts"]).sum(0), counts)
    metrics, p = window_metrics(window), counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(metrics["codebook_usage"], np.mean(counts > 0))
    np.testing.assert_allclose(metrics["codebook_perplexity"], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)


def test_empty_window_has_no_usage():
    metrics = window_metrics(init_window(8))
    assert (metrics["codebook_usage"], metrics["codebook_perplexity"]) == (0, 1)
    assert usage(jnp.array([1.0, 0.0])) == 0.5


@pytest.mark.parametrize(("num_codes", "count"), [(8, 5), (64, 100), (64, 5000)])
def test_expected_of_uniform_equals_sampled(num_codes, count):
    rng = np.random.default_rng(0)
    counts = rng.multinomial(count, np.full(num_codes, 1 / num_codes), 2000)
    usage, perplexity = expected_of_uniform(num_codes, count)
    assert usage == pytest.approx(np.mean(counts > 0), rel=1e-2)
    shares = np.where(counts > 0, counts, 1) / count
    entropy = -np.sum(np.where(counts > 0, shares * np.log(shares), 0), 1).mean()
    assert np.log(perplexity) == pytest.approx(entropy, rel=1e-2)


def test_expected_of_uniform_at_scale():
    usage, perplexity = expected_of_uniform(8192, 256 * 10**9)
    assert usage == pytest.approx(1)
    assert 8191.99 < perplexity <= 8192.001
    assert expected_of_uniform(8192, 1) == (pytest.approx(1 / 8192), pytest.approx(1))
