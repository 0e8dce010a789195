"""Softmaxes over a codebook in chunks against the whole matrix: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tokenizer.quantizers.arrays import normal, value_and_pullback
from tokenizer.quantizers.nearest import products, products_to_rows
from tokenizer.quantizers.softmax import entropies, soft_lookup


def whole_lookup(latents, rows):
    return jax.nn.softmax(latents @ rows.T) @ jax.lax.stop_gradient(rows)


def whole_entropies(latents, rows):
    distances = jnp.square(latents[:, None] - rows).sum(-1)
    p = jax.nn.softmax(-distances / 0.5)
    mean = p.mean(0)
    return -(p * jnp.log(p)).sum(-1).mean(), -(mean * jnp.log(mean)).sum()


@pytest.mark.parametrize("chunk", [7, 64])
def test_soft_lookup_equals_whole_softmax(chunk):
    latents, rows, cotangent = normal(2, 3, 4), normal(20, 4, seed=1), normal(2, 3, 4, seed=2)
    results = [
        value_and_pullback(function, (latents, rows), cotangent)
        for function in (lambda x, y: soft_lookup(x, y, products, chunk), whole_lookup)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize("chunk", [7, 64])
def test_entropies_equal_whole_softmax(chunk):
    latents, rows = normal(6, 4), normal(20, 4, seed=1)
    results = [
        value_and_pullback(function, (latents, rows), (jnp.float32(1.0), jnp.float32(-2.0)))
        for function in (lambda x, y: entropies(x, y, products_to_rows, 0.25, chunk), whole_entropies)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_entropies_are_finite_at_low_temperature():
    results = value_and_pullback(
        lambda x: entropies(x, normal(20, 4), products, 1e-4, 7), (10 * normal(6, 4),), (jnp.float32(1.0),) * 2
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def test_no_pass_holds_latents_times_codes():
    N, K, C = 512, 16384, 4

    def loss(latents, rows):
        of_samples, of_mean = entropies(latents, rows, products, 1.0)
        return soft_lookup(latents, rows, products).sum() + of_samples - of_mean

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, C), (K, C))]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * K * 4
