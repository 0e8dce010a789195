"""FSQ: levels, digits and the size that follows from them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common.errors import UserError
from tests.tokenizer.quantizers.arrays import normal
from tokenizer.network import VQGANConfig
from tokenizer.quantizers.fsq import FSQ

LEVELS = (4, 3, 2)


def test_every_code_has_its_vector():
    quantizer = FSQ(LEVELS)
    lookup, quantize = (jax.jit(functools.partial(f, {})) for f in (quantizer.lookup, quantizer.quantize))
    vectors = np.asarray(lookup(jnp.arange(24)))
    values = [np.array([-2, -1, 0, 1]) / 2, np.array([-1, 0, 1]), np.array([-1, 0])]
    expected = [combination[::-1] for combination in itertools.product(*values[::-1])]
    np.testing.assert_array_equal(vectors, np.array(expected))
    np.testing.assert_array_equal(quantize(vectors).codes, np.arange(24))
    np.testing.assert_array_equal(lookup(jnp.clip(jnp.arange(24) * 30 - 30, -1, 24)), vectors[[0, 0, *[23] * 22]])


def test_latents_reach_exactly_the_levels():
    latents = jnp.stack([jnp.linspace(-20, 20, 2001)] * 3, -1)
    quantizer = FSQ(LEVELS)
    prepared, vectors = jax.jit(lambda x: (y := quantizer.prepare(x), quantizer.quantize({}, y).vectors))(latents)
    assert [len(np.unique(column)) for column in np.asarray(vectors).round(5).T] == list(LEVELS)
    np.testing.assert_allclose(np.asarray(prepared)[1000], 0, atol=1e-5)


def test_codes_equal_published_formula():
    levels, z = np.array([8, 5, 5, 5]), np.float64(np.asarray(normal(50, 4)))
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2, 0, 0.5)
    bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
    digits = bounded.round() + levels // 2
    quantizer = FSQ()
    codes = jax.jit(lambda x: quantizer.quantize({}, quantizer.prepare(x)).codes)(jnp.asarray(z, jnp.float32))
    np.testing.assert_array_equal(codes, digits @ [1, 8, 40, 200])


def test_levels_determine_the_size():
    config = VQGANConfig(codebook_size=24, codebook_dim=3, quantizer=FSQ(LEVELS))
    with pytest.raises(UserError, match=r"codebook_size, codebook_dim=\(25, 3\) must be \(24, 3\)"):
        dataclasses.replace(config, codebook_size=25)
    with pytest.raises(UserError, match=r"levels=\(4, 1\)"):
        FSQ((4, 1))
