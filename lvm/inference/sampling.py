"""Token sampling with per-row temperature, top-k, top-p and key."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lvm.common.errors import UserError

# Values beyond these mean the same, and would leave the device's dtypes: logits / 1e-40 overflows.
_TINY, _MAX_TOP_K = 1e-30, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of a request.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: samples from the k most likely tokens; 0 means all.
      top_p: samples from the smallest set of tokens whose probabilities sum to p, after `top_k`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature} must be finite and not negative; use 0 for greedy decoding"
            )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be an integer from 0; use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]; use 1 for all tokens")


class BatchedSampling(NamedTuple):
    """`SamplingParams` and keys of a batch of rows, on device."""

    keys: Key[Array, " R"]
    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]


def batch_sampling(params: Sequence[SamplingParams], seeds: Sequence[int], candidates: int) -> BatchedSampling:
    """Settings of B requests with `candidates` rows each, as R = B · candidates rows, grouped by request."""
    keys = jnp.stack([jax.random.key(int(seed) % 2**32) for seed in seeds])  # [B]
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(keys, jnp.arange(candidates)).reshape(-1)  # [R]
    columns = {
        "temperature": jnp.array([p.temperature and max(p.temperature, _TINY) for p in params], jnp.float32),
        "top_k": jnp.array([min(p.top_k, _MAX_TOP_K) for p in params], jnp.int32),
        "top_p": jnp.array([max(p.top_p, _TINY) for p in params], jnp.float32),
    }
    return BatchedSampling(keys, **{name: jnp.repeat(column, candidates) for name, column in columns.items()})


def sample_token(logits: Float[Array, "R V"], sampling: BatchedSampling, index: Int[Array, ""]) -> Int[Array, " R"]:
    """Samples the new token `index` of every row; each (row, index) has its own random bits."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [R]
    is_random = sampling.temperature > 0  # [R]

    def sample() -> jax.Array:
        scaled = logits / jnp.where(is_random, sampling.temperature, 1)[:, None]
        # Sorting dominates the cost; it is skipped unless a row uses top-k or top-p.
        truncates = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
        scaled = jax.lax.cond(truncates, _truncate, lambda x, *_: x, scaled, sampling.top_k, sampling.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, index)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    return jnp.where(is_random, jax.lax.cond(jnp.any(is_random), sample, lambda: greedy), greedy)


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets logits outside top-k, then top-p, to −inf; ties with the last token kept are kept."""
    V = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)[:, None]  # [R, 1]
    descending = jnp.sort(logits, descending=True)  # [R, V]
    descending = jnp.where(jnp.arange(V) < k, descending, -jnp.inf)
    probabilities = jax.nn.softmax(descending)
    preceding = jnp.cumsum(probabilities, axis=-1) - probabilities
    preceding = jnp.where(top_p[:, None] < 1, preceding, 0)  # rounded sums may reach 1 before the end
    is_kept = (preceding < top_p[:, None]) & (descending > -jnp.inf)
    threshold = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)  # [R, 1]
    return jnp.where(logits < threshold, -jnp.inf, logits)
