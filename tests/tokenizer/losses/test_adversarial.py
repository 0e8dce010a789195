"""Adversarial losses by hand, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.losses import adversarial as losses

REAL, FAKE = jnp.array([[0.5, 2.0], [-1.0, 0.0]]), jnp.array([[-2.0, 0.5], [1.0, -0.5]])


def test_hinge_by_hand():
    assert losses.hinge_discriminator(REAL, FAKE) == 0.5 * ((0.5 + 0 + 2 + 1) / 4 + (0 + 1.5 + 2 + 0.5) / 4)
    assert losses.hinge_generator(FAKE) == 0.25


def test_non_saturating_by_hand():
    real, fake = np.asarray(REAL), np.asarray(FAKE)
    p_real, p_fake = 1 / (1 + np.exp(-real)), 1 / (1 + np.exp(-fake))
    expected = -np.log(p_real).mean() - np.log(1 - p_fake).mean()
    np.testing.assert_allclose(losses.non_saturating_discriminator(REAL, FAKE), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.non_saturating_generator(FAKE), -np.log(p_fake).mean(), rtol=1e-5)


def test_lecam_by_hand():
    value = losses.lecam(REAL, FAKE, jnp.float32(1.0), jnp.float32(-0.5))
    expected = (1.0 + 6.25 + 0 + 0.25) / 4 + (9 + 0.25 + 0 + 2.25) / 4
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_r1_of_linear_logits_has_closed_form():
    weights = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)  # of two patches
    images = jnp.ones((5, 4, 4, 3))
    value = jax.jit(lambda x: losses.r1(lambda x: jnp.einsum("bhwc,phwc->bp", x, weights), x))(images)
    np.testing.assert_allclose(value, 0.5 * np.square(weights.mean(0)).sum(), rtol=1e-5)


def test_r1_equals_finite_differences():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 4, 3)).astype(np.float32)
    images = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)

    def logits(x):
        return jnp.sin((x * weights).sum((1, 2, 3)))[:, None]

    value, gradient = jax.jit(jax.value_and_grad(lambda x: losses.r1(logits, x)))(images)
    f = lambda x: np.sin((x.astype(np.float64) * weights).sum())  # noqa: E731
    basis = np.eye(48).reshape(48, 4, 4, 3)
    squares = [sum(((f(x + 1e-4 * e) - f(x - 1e-4 * e)) / 2e-4) ** 2 for e in basis) for x in images]
    np.testing.assert_allclose(value, 0.5 * np.mean(squares), rtol=1e-4)
    s = (images.astype(np.float64) * weights).sum((1, 2, 3))  # R1 is ½ mean cos² s |w|², so this is its own gradient
    expected = -0.5 * (np.sin(2 * s) / 2 * np.square(weights).sum())[:, None, None, None] * weights
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_feature_matching_reaches_only_fakes():
    real, fake = [jnp.ones((1, 2)), jnp.zeros((1, 4))], [jnp.zeros((1, 2)), jnp.full((1, 4), 0.5)]
    assert losses.feature_matching(real, fake) == 0.5 * (1.0 + 0.5)
    to_real, to_fake = jax.grad(losses.feature_matching, argnums=(0, 1))(real, fake)
    assert max(float(jnp.abs(x).max()) for x in to_real) == 0
    np.testing.assert_allclose(to_fake[0], -0.25)


@pytest.mark.parametrize(("norms", "ratio"), [((3.0, 2.0), 1.5), ((1.0, 0.0), 1e4), ((0.0, 1.0), 0.0)])
def test_adaptive_weight_is_a_clipped_ratio(norms, ratio):
    np.testing.assert_allclose(losses.adaptive_weight(*map(jnp.float32, norms)), ratio, rtol=1e-4)
