"""Nearest codes of a codebook, in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tokenizer.quantizers.arrays import normal
from tokenizer.quantizers.nearest import lookup, nearest_codes, normalize, products


@pytest.mark.parametrize("chunk", [4, 7, 100])  # dividing the codebook, not dividing it, beyond it
def test_nearest_codes_equal_brute_force(chunk):
    latents, codebook = normal(3, 5, 4), normal(64, 4, seed=1)
    exact = np.asarray(latents)[..., None, :].astype(np.float64)
    codes = jax.jit(lambda x, y: nearest_codes(x, y, chunk))(latents, codebook)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, np.square(exact - codebook).sum(-1).argmin(-1))
    codes = jax.jit(lambda x, y: nearest_codes(x, y, chunk, affinity=products))(latents, codebook)
    np.testing.assert_array_equal(codes, (exact * codebook).sum(-1).argmax(-1))


@pytest.mark.parametrize("chunk", [2, 2048])
def test_nearest_codes_break_ties_to_the_lowest(chunk):
    np.testing.assert_array_equal(nearest_codes(jnp.ones((2, 3)), jnp.ones((7, 3)), chunk), [0, 0])


def test_lookup_inverts_nearest_codes():
    codebook = normal(16, 4)
    codes = jnp.array([[3, 0], [15, 7]])
    rows = lookup(codes, codebook)
    np.testing.assert_array_equal(rows, np.asarray(codebook)[np.asarray(codes)])
    np.testing.assert_array_equal(nearest_codes(rows, codebook), codes)


def test_normalize_keeps_zero():
    np.testing.assert_array_equal(normalize(jnp.zeros((2, 4))), 0.0)
