"""Vector quantization: nearest codes, and a codebook learned by moving averages (VQ-VAE, arXiv 1711.00937).

Pure functions of arrays. A codebook is float32 [K, C]; latents are float32 [..., C]; codes are int32 [...].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lvm.model.nnx_utils import Params


def normalize(vectors: jax.Array) -> jax.Array:
    """Vectors float32 [..., C], each divided by its Euclidean length."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(squares + 1e-12)


def nearest_codes(latents: jax.Array, codebook: jax.Array, chunk: int = 2048) -> jax.Array:
    """Latents [..., C], codebook [K, C] → int32 [...], the row at the least squared distance.

    argmin |z − e|² = argmax z·e − ½|e|²; among equals the lowest code wins. Computed in float32 at the
    highest precision, since near ties decide codes. The codebook is taken `chunk` rows at a time, which
    bounds memory to latents × chunk; cutting the latents instead would cut across a sharded batch.
    """
    latents = latents.astype(jnp.float32)
    K, C = codebook.shape
    chunks = -(-K // chunk)
    if chunks == 1:
        return jnp.argmax(_scores(latents, codebook), axis=-1).astype(jnp.int32)

    # Rows of padding are never the nearest: their score is −∞.
    rows = jnp.pad(codebook, ((0, chunks * chunk - K), (0, 0))).reshape(chunks, chunk, C)
    valid = (jnp.arange(chunks * chunk) < K).reshape(chunks, chunk)

    def best_of_chunk(
        best: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        best_score, best_code = best
        first, rows, valid = inputs
        scores = jnp.where(valid, _scores(latents, rows), -jnp.inf)  # [..., chunk]
        code = first + jnp.argmax(scores, axis=-1).astype(jnp.int32)
        score = jnp.max(scores, axis=-1)
        better = score > best_score
        return (jnp.where(better, score, best_score), jnp.where(better, code, best_code)), None

    start = (jnp.full(latents.shape[:-1], -jnp.inf), jnp.zeros(latents.shape[:-1], jnp.int32))
    firsts = jnp.arange(chunks, dtype=jnp.int32) * chunk
    (_, codes), _ = jax.lax.scan(best_of_chunk, start, (firsts, rows, valid))
    return codes


def _scores(latents: jax.Array, rows: jax.Array) -> jax.Array:
    products = jnp.einsum("...c,kc->...k", latents, rows, precision="highest")
    return products - 0.5 * jnp.sum(jnp.square(rows), axis=-1)


def lookup(codes: jax.Array, codebook: jax.Array) -> jax.Array:
    """Codes int32 [...], codebook [K, C] → its rows, [..., C]; a code outside [0, K) counts as 0 or K − 1."""
    return jnp.take(codebook, codes, axis=0, mode="clip")


def straight_through(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The value of `quantized` with the gradient of `latents`, both [..., C]."""
    return latents + jax.lax.stop_gradient(quantized - latents)


def init_moving_averages(codebook: jax.Array) -> Params:
    """The statistics of codebook [K, C]: `counts` float32 [K], all 1, and `sums` float32 [K, C]."""
    return {"counts": jnp.ones(codebook.shape[0]), "sums": codebook}


def update_codebook(
    averages: Params, latents: jax.Array, codes: jax.Array, rng: jax.Array,
    *, decay: float, dead_below: float, l2_normalize: bool,
) -> tuple[Params, jax.Array]:  # fmt: skip
    """One step of moving averages (arXiv 1711.00937, appendix A.1), then a reset of dead codes.

    `latents` [N, C] and their `codes` [N] give each code's count and sum in the batch; the averages keep
    `decay` of what they held. A code whose averaged count falls under `dead_below` takes the place of a
    random latent of the batch and counts once (as in Jukebox, arXiv 2005.00341).
    Returns (averages, codebook).
    """
    K = averages["counts"].shape[0]
    counts = jax.ops.segment_sum(jnp.ones(codes.shape), codes, num_segments=K)  # [K]
    sums = jax.ops.segment_sum(latents, codes, num_segments=K)  # [K, C]
    counts = decay * averages["counts"] + (1 - decay) * counts
    sums = decay * averages["sums"] + (1 - decay) * sums

    dead = counts < dead_below  # [K]
    counts = jnp.where(dead, 1.0, counts)
    sums = jnp.where(dead[:, None], sample_latents(latents, K, rng), sums)
    codebook = sums / counts[:, None]
    return {"counts": counts, "sums": sums}, normalize(codebook) if l2_normalize else codebook


def sample_latents(latents: jax.Array, count: int, rng: jax.Array) -> jax.Array:
    """`count` rows of latents [N, C], drawn without replacement as long as there are enough."""
    rows = latents.shape[0]
    shuffled = jax.random.permutation(rng, rows)  # [N]
    return latents[shuffled[jnp.arange(count) % rows]]


def histogram(codes: jax.Array, codebook_size: int) -> jax.Array:
    """How often each code occurs: codes int32 [...] → float32 [K]."""
    return jnp.bincount(codes.reshape(-1), length=codebook_size).astype(jnp.float32)


def usage(counts: jax.Array) -> jax.Array:
    """The share of codes that occur at all in a `histogram` [K]: float32 in [0, 1]."""
    return jnp.mean((counts > 0).astype(jnp.float32))
