"""Gradient estimators: from a quantized vector to its latent. Values are those of the vectors, to rounding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def straight_through(latents: Float[Array, "*n C"], vectors: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """The value of `vectors` with the gradient of `latents` (arXiv 1308.3432)."""
    return latents + jax.lax.stop_gradient(vectors - latents)


def rotation(latents: Float[Array, "*n C"], vectors: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """The value of `vectors`, as the latents rotated and scaled by constants (rotation trick, arXiv 2410.06424).

    With unit vectors e of the latent and q of the vector, and r = (e + q) / |e + q|, the latent x becomes
    |vector| / |latent| · (x − 2 r rᵀx + 2 q eᵀx). Unlike straight-through, the gradient keeps its angle to the vector.
    """
    scale, e, q = jax.lax.stop_gradient((_length(vectors) / _length(latents), _unit(latents), _unit(vectors)))
    r = _unit(e + q)
    dot = lambda a, b: jnp.sum(a * b, -1, keepdims=True)  # noqa: E731
    return scale * (latents - 2 * r * dot(r, latents) + 2 * q * dot(e, latents))


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def _unit(x: jax.Array) -> jax.Array:
    return x / _length(x)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}
