"""Losses between images, and between latents and codes: means over every element, float32 scalars.

Images are float32 [B, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def l1(images: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean absolute difference."""
    return jnp.mean(jnp.abs(images - targets))


def l2(images: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared difference."""
    return jnp.mean(jnp.square(images - targets))


def gradient_l1(images: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean absolute difference of the images' horizontal and vertical steps: it asks for sharp edges."""
    error = images - targets  # differences are linear: those of the error are the error of the differences
    return jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))


def commitment(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """Mean squared distance that draws latents [..., C] to their codes (arXiv 1711.00937, eq. 3)."""
    return jnp.mean(jnp.square(latents - jax.lax.stop_gradient(quantized)))
