"""Usage and perplexity over a sliding window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokenizer.code_usage import init_window, update_window, usage, window_metrics


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
