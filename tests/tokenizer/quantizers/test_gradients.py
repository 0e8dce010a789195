"""Gradient estimators: values, and pullbacks against explicit matrices."""

import jax.numpy as jnp
import numpy as np

from tests.tokenizer.quantizers.arrays import normal, value_and_pullback
from tokenizer.quantizers.gradients import rotation, straight_through


def test_straight_through_value_and_gradient():
    latents, vectors = normal(5, 3), normal(5, 3, seed=1)
    value, (to_latents, to_vectors) = value_and_pullback(straight_through, (latents, vectors), jnp.full((5, 3), 2.0))
    np.testing.assert_allclose(value, vectors, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(to_latents, 2.0)
    np.testing.assert_array_equal(to_vectors, 0.0)


def test_rotation_pulls_back_by_its_matrix():
    latents, vectors, cotangent = normal(5, 3), normal(5, 3, seed=1), normal(5, 3, seed=2)
    value, (to_latents, to_vectors) = value_and_pullback(rotation, (latents, vectors), cotangent)
    np.testing.assert_allclose(value, vectors, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(to_vectors, 0.0)
    for i in range(5):
        x, v, g = (np.float64(np.asarray(array))[i] for array in (latents, vectors, cotangent))
        e, q = x / np.linalg.norm(x), v / np.linalg.norm(v)
        # The rotation in the plane of e and q: I + (q eᵀ − e qᵀ) + (q eᵀ − e qᵀ)² / (1 + e·q), by Rodrigues.
        K = np.outer(q, e) - np.outer(e, q)
        matrix = np.linalg.norm(v) / np.linalg.norm(x) * (np.eye(3) + K + K @ K / (1 + e @ q))
        np.testing.assert_allclose(matrix @ x, v, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(to_latents)[i], matrix.T @ g, rtol=1e-4, atol=1e-5)
