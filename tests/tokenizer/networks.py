"""Small networks of the published variants, with parameters away from their initial values."""

import dataclasses

import jax
import numpy as np

from lvm.data.images.preprocess import Preprocess
from lvm.model import nnx_utils
from tokenizer.network import VARIANTS, VQGAN
from tokenizer.weights import Weights

SIZES = {"resolution": 64, "channels": 32, "codebook_size": 128, "codebook_dim": 8}


def small(variant, **sizes):
    """A published network at reduced width; 32 norm groups of one channel, because the layouts of `lvm` fix 32."""
    return dataclasses.replace(VARIANTS[variant], **{**SIZES, **sizes})


def random_weights(config, seed=0, **preprocess):
    """Random weights everywhere, so that swapped, transposed or missing tensors show."""
    _, shapes = nnx_utils.abstract_module(lambda rngs: VQGAN(config, rngs))
    rng = np.random.default_rng(seed)

    def sample(path, leaf):
        if leaf.ndim == 1:  # scales around 1, biases around 0
            return np.float32(path[-1].key == "scale") + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-1]
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

    params = jax.tree.map_with_path(sample, shapes)
    return Weights(config, Preprocess(config.resolution, **preprocess), params)


def same_bits(params, others):
    """Asserts that two trees have equal float32 leaves, bit by bit."""
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for path, leaf in jax.tree.leaves_with_path(params):
        other = others
        for key in path:
            other = other[key.key]
        assert np.asarray(leaf).dtype == np.asarray(other).dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint32), np.asarray(other).view(np.uint32))


def check_same(stored, expected):
    """Asserts that two tokenizers are equal, bit by bit."""
    assert (stored.config, stored.preprocess) == (expected.config, expected.preprocess)
    same_bits(stored.params, expected.params)
