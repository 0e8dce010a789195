"""Vector quantization: nearest codes, and a codebook learned by moving averages (VQ-VAE, arXiv 1711.00937).

Pure functions of arrays: a codebook has K rows of C channels, codes index its rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvm.model.nnx_utils import Params


def normalize(vectors: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Vectors scaled to unit Euclidean length."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(squares + 1e-12)


def nearest_codes(latents: Float[Array, "*n C"], codebook: Float[Array, "K C"], chunk: int = 2048) -> Int[Array, "*n"]:
    """Index of the codebook row at the least squared distance; the lowest among equals. int32.

    argmin |z − e|² = argmax z·e − ½|e|², in float32 at the highest precision, because near ties decide codes. The
    codebook is scanned `chunk` rows at a time, which bounds memory to latents × chunk; chunks of the latents instead
    would cut across a sharded batch.
    """
    latents = latents.astype(jnp.float32)
    K, C = codebook.shape
    num_chunks = -(-K // chunk)
    if num_chunks == 1:
        return jnp.argmax(_scores(latents, codebook), axis=-1).astype(jnp.int32)

    # Padding rows score −∞.
    rows = jnp.pad(codebook, ((0, num_chunks * chunk - K), (0, 0))).reshape(num_chunks, chunk, C)
    valid = (jnp.arange(num_chunks * chunk) < K).reshape(num_chunks, chunk)

    def update_best(
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
    firsts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
    (_, codes), _ = jax.lax.scan(update_best, start, (firsts, rows, valid))
    return codes


def _scores(latents: jax.Array, rows: jax.Array) -> jax.Array:
    products = jnp.einsum("...c,kc->...k", latents, rows, precision="highest")
    return products - 0.5 * jnp.sum(jnp.square(rows), axis=-1)


def lookup(codes: Int[Array, "*n"], codebook: Float[Array, "K C"]) -> Float[Array, "*n C"]:
    """Codebook rows of the codes; codes outside [0, K) are clipped."""
    return jnp.take(codebook, codes, axis=0, mode="clip")


def straight_through(latents: Float[Array, "*n C"], quantized: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """The value of `quantized` with the gradient of `latents`."""
    return latents + jax.lax.stop_gradient(quantized - latents)


def init_moving_averages(codebook: Float[Array, "K C"]) -> Params:
    """Initial statistics: `counts` float32 [K], all 1, and `sums` float32 [K, C]."""
    return {"counts": jnp.ones(codebook.shape[0]), "sums": codebook}


def update_codebook(
    averages: Params, latents: Float[Array, "N C"], codes: Int[Array, " N"], rng: jax.Array,
    *, decay: float, dead_below: float, l2_normalize: bool,
) -> tuple[Params, Float[Array, "K C"]]:  # fmt: skip
    """One step of moving averages (arXiv 1711.00937, appendix A.1), then a reset of dead codes.

    A code whose averaged count is below `dead_below` is replaced by a random latent of the batch with count 1 (as in
    Jukebox, arXiv 2005.00341).

    Returns:
      The new averages, and the codebook that follows from them.
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


def sample_latents(latents: Float[Array, "N C"], count: int, rng: jax.Array) -> Float[Array, "{count} C"]:
    """`count` random rows, without replacement while they last."""
    rows = latents.shape[0]
    shuffled = jax.random.permutation(rng, rows)  # [N]
    return latents[shuffled[jnp.arange(count) % rows]]


def histogram(codes: Int[Array, "*n"], codebook_size: int) -> Float[Array, " K"]:
    """Number of occurrences of each code, as float32."""
    return jnp.bincount(codes.reshape(-1), length=codebook_size).astype(jnp.float32)


def usage(counts: Float[Array, " K"]) -> Float[Array, ""]:
    """Share of codes that occur, of a `histogram`."""
    return jnp.mean((counts > 0).astype(jnp.float32))
