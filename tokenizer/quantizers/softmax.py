"""Softmaxes of latents over a codebook, N × K, of which only N × `CHUNK` is ever in memory.

Each pass scans chunks of the codebook and recomputes a chunk's affinities for the gradient, so that memory is a few
arrays of N × `CHUNK` floats, forward and backward: for 65,536 latents 0.5 GB each, where N × 65,536 codes are 17 GB.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenizer.quantizers.nearest import CHUNK, split_rows

Affinity = Callable[[jax.Array, jax.Array], jax.Array]  # latents [N, C], rows [k, C] → [N, k]


def soft_lookup(
    latents: Float[Array, "*n C"], rows: Float[Array, "K C"], affinity: Affinity, chunk: int = CHUNK
) -> Float[Array, "*n C"]:
    """Rows averaged by softmax(affinity). Gradients go through the weights; the averaged rows are constant."""
    flat, chunks = latents.reshape(-1, latents.shape[-1]), split_rows(rows, chunk)
    normalizers = _log_normalizers(flat, chunks, affinity, 1.0)

    @jax.checkpoint
    def weighted(latents: jax.Array, normalizers: jax.Array, rows: jax.Array, valid: jax.Array) -> jax.Array:
        weights = jnp.exp(_logits(latents, rows, valid, affinity, 1.0) - normalizers[:, None])  # [N, chunk]
        return jnp.einsum("nk,kc->nc", weights, jax.lax.stop_gradient(rows), precision="highest")

    def add(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        _, rows, valid = inputs
        return total + weighted(flat, normalizers, rows, valid), None

    return jax.lax.scan(add, jnp.zeros_like(flat), chunks)[0].reshape(latents.shape)


def entropies(
    latents: Float[Array, "*n C"], rows: Float[Array, "K C"], affinity: Affinity, temperature: float, chunk: int = CHUNK
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Entropies in nats of p = softmax(affinity / temperature): the mean of the latents' own, and that of the mean p.

    Their difference is the penalty of MaskGIT and MAGVIT (arXiv 2310.05737, eq. 5): small if every latent is decided
    and all codes are used equally.
    """
    flat, chunks = latents.reshape(-1, latents.shape[-1]), split_rows(rows, chunk)
    normalizers = _log_normalizers(flat, chunks, affinity, temperature)

    @jax.checkpoint
    def sums(
        latents: jax.Array, normalizers: jax.Array, rows: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        log_p = _logits(latents, rows, valid, affinity, temperature) - normalizers[:, None]  # [N, chunk]
        p = jnp.exp(log_p)
        mean = p.mean(0)  # [chunk]
        return -(p * log_p).sum(-1).mean(), -(mean * jnp.log(mean + 1e-9)).sum()

    def add(
        totals: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        of_samples, of_mean = sums(flat, normalizers, *inputs[1:])
        return (totals[0] + of_samples, totals[1] + of_mean), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), chunks)[0]


def _log_normalizers(
    latents: jax.Array, chunks: tuple[jax.Array, ...], affinity: Affinity, temperature: float
) -> jax.Array:
    """Log-sum-exp of affinity / temperature over all rows, [N]."""

    @jax.checkpoint
    def of_chunk(latents: jax.Array, rows: jax.Array, valid: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(_logits(latents, rows, valid, affinity, temperature), -1)  # [N]

    return jax.nn.logsumexp(jax.lax.map(lambda inputs: of_chunk(latents, *inputs[1:]), chunks), 0)


def _logits(latents: jax.Array, rows: jax.Array, valid: jax.Array, affinity: Affinity, temperature: float) -> jax.Array:
    # A large finite number: p log p of a padding row must be 0, not NaN.
    return jnp.where(valid, affinity(latents, rows) / temperature, -1e30)
