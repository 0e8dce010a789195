"""Losses between images in [0, 1], and between latents and codes: means over all elements, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Mean absolute difference."""
    return jnp.mean(jnp.abs(images - targets))


def l2(images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Mean squared difference."""
    return jnp.mean(jnp.square(images - targets))


def gradient_l1(images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Mean absolute difference of horizontal and vertical image gradients: rewards sharp edges."""
    error = images - targets  # the gradient is linear
    return jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))


def commitment(latents: Float[Array, "*n C"], quantized: Float[Array, "*n C"]) -> Float[Array, ""]:
    """Mean squared distance of latents from their codes, constant in the codes (arXiv 1711.00937, eq. 3)."""
    return jnp.mean(jnp.square(latents - jax.lax.stop_gradient(quantized)))
