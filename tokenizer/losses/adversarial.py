"""Adversarial losses: of logits, and of a discriminator's gradients and features. Scalars are means, float32."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "B *n"]


def hinge_discriminator(real: Logits, fake: Logits) -> Float[Array, ""]:
    """Hinge loss of a discriminator (arXiv 1705.02894), halved as in VQGAN."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Logits) -> Float[Array, ""]:
    """Hinge loss of a generator."""
    return -jnp.mean(fake)


def non_saturating_discriminator(real: Logits, fake: Logits) -> Float[Array, ""]:
    """Cross-entropy of a discriminator (arXiv 1406.2661)."""
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def non_saturating_generator(fake: Logits) -> Float[Array, ""]:
    """Non-saturating loss of a generator."""
    return jnp.mean(jax.nn.softplus(-fake))


OBJECTIVES = {
    "hinge": (hinge_discriminator, hinge_generator),
    "non_saturating": (non_saturating_discriminator, non_saturating_generator),
}


def lecam(
    real: Logits, fake: Logits, average_real: Float[Array, ""], average_fake: Float[Array, ""]
) -> Float[Array, ""]:
    """LeCam regularization against moving averages of both kinds of logits (arXiv 2104.03310, as in its code)."""
    to_fake = jnp.mean(jnp.square(jax.nn.relu(real - average_fake)))
    return to_fake + jnp.mean(jnp.square(jax.nn.relu(average_real - fake)))


def r1(logits: Callable[[jax.Array], jax.Array], images: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Half the mean squared length of the gradient of an image's mean logit by its pixels (arXiv 1801.04406)."""
    gradient = jax.grad(lambda x: jnp.sum(logits(x).reshape(len(x), -1).mean(-1)))(images)
    return 0.5 * jnp.mean(jnp.sum(jnp.square(gradient), (1, 2, 3)))


def feature_matching(real: Sequence[jax.Array], fake: Sequence[jax.Array]) -> Float[Array, ""]:
    """Mean absolute difference of a discriminator's features, averaged over layers (arXiv 1711.11585)."""
    terms = [
        jnp.mean(jnp.abs(jax.lax.stop_gradient(a) - b).astype(jnp.float32)) for a, b in zip(real, fake, strict=True)
    ]
    return jnp.mean(jnp.stack(terms))


def adaptive_weight(reconstruction_norm: Float[Array, ""], adversarial_norm: Float[Array, ""]) -> Float[Array, ""]:
    """Ratio of the gradient norms of two losses, at most 10⁴ (VQGAN, arXiv 2012.09841, eq. 7)."""
    return jnp.clip(reconstruction_norm / (adversarial_norm + 1e-4), 0.0, 1e4)
