"""How a next token is drawn from the logits: each row by its own temperature, top-k, top-p and key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lvm.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn from the logits.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 means all.
      top_p: only the smallest set of tokens whose probabilities sum to p, after `top_k`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: {self.temperature} is not a number from 0 on")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is not a whole number from 0 on; 0 means all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")


class SamplingParams(NamedTuple):
    """How each row draws: keys [R], temperature and top_p float32 [R], top_k int32 [R]."""

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def draws(samplings: Sequence[Sampling], seeds: Sequence[int], candidates: int) -> SamplingParams:
    """`SamplingParams` of B requests with `candidates` each: rows [B · candidates], a request's side by side."""
    keys = jnp.stack([jax.random.key(int(seed) % 2**32) for seed in seeds])  # [B]
    of_candidates = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = of_candidates(keys, jnp.arange(candidates)).reshape(-1)  # [R]
    fields = [(s.temperature, s.top_k, s.top_p) for s in samplings for _ in range(candidates)]
    columns = zip(*fields, strict=True)
    types = (jnp.float32, jnp.int32, jnp.float32)
    return SamplingParams(
        keys, *(jnp.array(column, dtype) for column, dtype in zip(columns, types, strict=True))
    )


def sample_token(logits: jax.Array, draws: SamplingParams, number: jax.Array) -> jax.Array:
    """The `number`-th new token of every row: logits float32 [R, V] → int32 [R]."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [R]
    warm = draws.temperature > 0  # [R]

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(warm, draws.temperature, 1)[:, None]
        cuts = jnp.any((draws.top_k > 0) | (draws.top_p < 1))
        # Sorting is the dear part: it is left out where no row asks for it.
        kept = jax.lax.cond(cuts, _cut_tail, lambda scaled, *_: scaled, scaled, draws.top_k, draws.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(draws.keys, number)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return jnp.where(warm, jax.lax.cond(jnp.any(warm), drawn, lambda: likeliest), likeliest)


def _cut_tail(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """−inf for what top-k and then top-p leave out; tokens as likely as the last one kept stay."""
    V = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)[:, None]  # [R, 1]
    descending = jnp.sort(logits, descending=True)  # [R, V]
    descending = jnp.where(jnp.arange(V) < k, descending, -jnp.inf)
    shares = jax.nn.softmax(descending)
    ahead = jnp.cumsum(shares, axis=-1) - shares  # the mass ahead of each
    ahead = jnp.where(top_p[:, None] < 1, ahead, 0)  # rounded sums may reach 1 before the end
    kept = (ahead < top_p[:, None]) & (descending > -jnp.inf)
    last = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)  # [R, 1]
    return jnp.where(logits < last, -jnp.inf, logits)
