"""Nearest codes of a codebook, and how often codes occur.

Pure functions of arrays: a codebook has K rows of C channels, codes index its rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 2048  # rows of a codebook that are compared at a time


def normalize(vectors: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Vectors scaled to unit Euclidean length."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(squares + 1e-12)


def products(latents: Float[Array, "*n C"], rows: Float[Array, "K C"]) -> Float[Array, "*n K"]:
    """Dot products at the highest precision."""
    return jnp.einsum("...c,kc->...k", latents, rows, precision="highest")


def products_to_rows(latents: Float[Array, "*n C"], rows: Float[Array, "K C"]) -> Float[Array, "*n K"]:
    """z·e − ½|e|²: half the negative squared distance, up to a term that depends on the latent alone."""
    return products(latents, rows) - 0.5 * jnp.sum(jnp.square(rows), axis=-1)


def nearest_codes(
    latents: Float[Array, "*n C"], codebook: Float[Array, "K C"], chunk: int = CHUNK,
    affinity: Callable[[jax.Array, jax.Array], jax.Array] = products_to_rows,
) -> Int[Array, "*n"]:  # fmt: skip
    """Index of the codebook row with the largest affinity, by default the nearest; the lowest among equals. int32.

    argmin |z − e|² = argmax z·e − ½|e|², in float32 at the highest precision, because near ties decide codes. The
    codebook is scanned `chunk` rows at a time, which bounds memory to latents × chunk; chunks of the latents instead
    would cut across a sharded batch.
    """
    latents = latents.astype(jnp.float32)
    if len(codebook) <= chunk:
        return jnp.argmax(affinity(latents, codebook), axis=-1).astype(jnp.int32)

    def update_best(
        best: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        best_score, best_code = best
        first, rows, valid = inputs
        scores = jnp.where(valid, affinity(latents, rows), -jnp.inf)  # [..., chunk]
        code = first + jnp.argmax(scores, axis=-1).astype(jnp.int32)
        score = jnp.max(scores, axis=-1)
        better = score > best_score
        return (jnp.where(better, score, best_score), jnp.where(better, code, best_code)), None

    start = (jnp.full(latents.shape[:-1], -jnp.inf), jnp.zeros(latents.shape[:-1], jnp.int32))
    (_, codes), _ = jax.lax.scan(update_best, start, split_rows(codebook, chunk))
    return codes


def split_rows(
    codebook: Float[Array, "K C"], chunk: int
) -> tuple[Int[Array, " n"], Float[Array, "n chunk C"], Bool[Array, "n chunk"]]:
    """Chunks of the rows: index of the first, rows, and a mask that is false for padding."""
    K, C = codebook.shape
    chunk = min(chunk, K)
    num_chunks = -(-K // chunk)
    rows = jnp.pad(codebook, ((0, num_chunks * chunk - K), (0, 0))).reshape(num_chunks, chunk, C)
    valid = (jnp.arange(num_chunks * chunk) < K).reshape(num_chunks, chunk)
    return jnp.arange(num_chunks, dtype=jnp.int32) * chunk, rows, valid


def lookup(codes: Int[Array, "*n"], codebook: Float[Array, "K C"]) -> Float[Array, "*n C"]:
    """Codebook rows of the codes; codes outside [0, K) are clipped."""
    return jnp.take(codebook, codes, axis=0, mode="clip")
