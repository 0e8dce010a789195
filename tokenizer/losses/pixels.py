"""Losses between the pixels of images in [0, 1]: means over all elements, float32."""

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
