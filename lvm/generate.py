"""Prompts → codes: prefill, then one jitted decode loop over a KV cache."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvm.distributed import fetch
from lvm.errors import UserError
from lvm.model import Transformer
from lvm.module import Params, merge


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn from the logits.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 means all.
      top_p: only the smallest set of tokens whose probabilities sum to p.
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


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row: logits float32 [V], one key → int32 []."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.size))[0][-1]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, descending=True)  # [V]
        before = jnp.cumsum(jax.nn.softmax(descending)) - jax.nn.softmax(descending)  # mass ahead of each
        smallest = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf))
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate_tokens(
    graphdef: Any,
    params: Params,
    prompts: Sequence[np.ndarray],
    length: int,
    sampling: Sampling,
    seeds: Sequence[int],
    candidates: int = 1,
    num_allowed: int | None = None,
) -> np.ndarray:
    """Continues token prompts of equal or unequal length.

    A row's result depends on its own prompt and seed alone, not on the rows beside it.

    Args:
      graphdef, params: a `Transformer`, split.
      prompts: B arrays int32 [S_i], S_i ≥ 1.
      length: new tokens a prompt.
      sampling: how tokens are drawn.
      seeds: B numbers.
      candidates: continuations a prompt; they share the prefill.
      num_allowed: only ids below this are drawn; None allows all.

    Returns:
      int32 [B, candidates, length].

    Raises:
      UserError: an empty prompt, or one that with the answer is longer than the model's context.
    """
    if length < 1:
        raise UserError(f"length: {length} new tokens; at least 1")
    config = merge(graphdef, params).config
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)  # [B]
    if lengths.min(initial=1) < 1:
        raise UserError("a prompt is empty; give at least one token")
    longest = int(lengths.max())
    # The last new token is never an input, so it needs no place in the context.
    if longest + length - 1 > config.context:
        raise UserError(
            f"a prompt of {longest} tokens and {length} new ones need a context of {longest + length - 1}; "
            f"the model has {config.context}"
        )
    padded = np.zeros((len(prompts), longest), np.int32)  # [B, S]
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jnp.stack([_key(seed) for seed in seeds])  # [B]
    run = _compiled(graphdef, length, sampling, candidates, num_allowed)
    return fetch(run(params, padded, lengths, keys))


def _key(seed: int) -> jax.Array:
    return jax.random.key(int(seed) % 2**32)


@functools.lru_cache(maxsize=16)
def _compiled(
    graphdef: Any, length: int, sampling: Sampling, candidates: int, num_allowed: int | None
) -> Any:
    @jax.jit
    def run(params: Params, prompts: jax.Array, lengths: jax.Array, keys: jax.Array) -> jax.Array:
        model: Transformer = merge(graphdef, params)
        hidden, cache = _prefill(model, prompts, lengths, prompts.shape[1] + length)
        logits = jnp.repeat(model.logits(hidden), candidates, axis=0)  # [B·C, V]
        cache = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=1), cache)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        keys = fold(keys, jnp.arange(candidates)).reshape(-1)  # [B·C]
        starts = jnp.repeat(lengths, candidates)  # [B·C]
        tokens = _decode(model, logits, cache, starts, keys, length, sampling, num_allowed)
        return tokens.reshape(-1, candidates, length)

    return run


def _prefill(model: Transformer, prompts: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, Any]:
    """Runs padded prompts [B, S]; returns the hidden state of each one's last token [B, D], and the cache.

    What padding writes into the cache lies at positions after the prompt: the decode loop writes its own
    tokens there before any query looks.
    """
    B, S = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    hidden, cache = model.extend(prompts, positions, model.empty_cache(B, size))
    return hidden[jnp.arange(B), lengths - 1], cache


def _decode(
    model: Transformer,
    logits: jax.Array,
    cache: Any,
    starts: jax.Array,
    keys: jax.Array,
    length: int,
    sampling: Sampling,
    num_allowed: int | None,
) -> jax.Array:
    """From the first logits [B, V], and a cache filled up to `starts` [B], draws `length` tokens a row."""

    def draw(logits: jax.Array, step: jax.Array) -> jax.Array:
        if num_allowed is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < num_allowed, logits, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(lambda row, key: sample(row, key, sampling))(logits, step_keys)  # [B]

    def advance(carry: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        positions = (starts + step)[:, None]  # [B, 1]
        hidden, cache = model.extend(token[:, None], positions, cache)
        return (draw(model.logits(hidden[:, 0]), step + 1), cache), token

    first = draw(logits, jnp.int32(0))
    (last, _), tokens = jax.lax.scan(advance, (first, cache), jnp.arange(length - 1))
    return jnp.concatenate([tokens, last[None]]).T  # [B, length]
