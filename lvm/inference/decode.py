"""The compiled programs: prompts are read into a cache in one forward, then one loop writes token after token."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lvm.hardware import sharding
from lvm.inference.decode_params import build_module
from lvm.inference.sampling import BatchedSampling, sample_token
from lvm.model.nnx_utils import Params
from lvm.model.transformer import CACHE_AXES, Cache, DecodePosition, ModelConfig

_STATIC = ("config", "mesh")


class DecodeState(NamedTuple):
    """Rows that are being written.

    Attributes:
      caches: a layer each; keys and values of what was read, S places a row.
      place: where `token` goes; what lies before it is visible, and padding isn't.
      token: int32 [R], the newest token, not in the caches yet.
      number: int32 [], how many tokens were written.
      written: int32 [R, A], those tokens.
    """

    caches: list[Cache]
    place: DecodePosition
    token: jax.Array
    number: jax.Array
    written: jax.Array


@functools.partial(jax.jit, static_argnames=(*_STATIC, "kernel", "size", "candidates", "room"))
def prefill(
    weights: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
    kernel: str,
    size: int,
    candidates: int,
    room: int,
) -> DecodeState:
    """Reads padded prompts [B, T] of `lengths` [B], each once for all its candidates.

    Args:
      weights: as `prepare` gave them.
      size: places of a cache, S > T.
      candidates: rows a prompt.
      room: tokens that can be written, A.
    """
    with sharding.use_mesh(mesh):
        caches, place = _read(weights, prompts, lengths, config, kernel, size, candidates)
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]  # [B]
        token = jnp.repeat(last, candidates)  # [R]
        return DecodeState(caches, place, token, jnp.int32(0), jnp.zeros((len(token), room), jnp.int32))


@functools.partial(jax.jit, static_argnames=(*_STATIC, "num_allowed"), donate_argnames="state")
def decode(
    weights: Params,
    state: DecodeState,
    draws: BatchedSampling,
    steps: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
    num_allowed: int,
) -> DecodeState:
    """Writes as many tokens as `steps` says, in one loop; ids from `num_allowed` on are never drawn."""
    with sharding.use_mesh(mesh):

        def advance(state: DecodeState) -> DecodeState:
            model = build_module(weights, config)  # inside of the loop, or its views would be copies
            position, slot, visible = state.place
            place = DecodePosition(position, slot, visible | (jnp.arange(visible.shape[1]) == slot))
            hidden, caches = model.decode_step(state.token, place, state.caches)
            logits = model.logits(hidden)[:, :num_allowed]  # [R, allowed]
            token = sample_token(logits, draws, state.number)
            written = jax.lax.dynamic_update_slice(state.written, token[:, None], (0, state.number))
            place = DecodePosition(position + 1, slot + 1, place.visible)
            return DecodeState(caches, place, token, state.number + 1, written)

        end = state.number + steps
        return jax.lax.while_loop(lambda state: state.number < end, advance, state)


@functools.partial(jax.jit, static_argnames=(*_STATIC, "kernel"), donate_argnames="state")
def re_prefill(
    weights: Params,
    state: DecodeState,
    windows: jax.Array,
    lengths: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
    kernel: str,
) -> DecodeState:
    """Reads new windows [R, T] of `lengths` [R], padded, each with the row's newest token last, in place of the old."""
    with sharding.use_mesh(mesh):
        size = state.place.visible.shape[1]
        caches, place = _read(weights, windows, lengths, config, kernel, size, candidates=1)
        return state._replace(caches=caches, place=place)


def _read(
    weights: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    config: ModelConfig,
    kernel: str,
    size: int,
    candidates: int,
) -> tuple[list[Cache], DecodePosition]:
    """Caches of `size` places that hold rows [B, T], and where the last token of each goes."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    _, caches = build_module(weights, config).prefill(tokens, positions, kernel)  # each [B, K, T, d]

    def hold(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - T), (0, 0)))
        # A lone row has no batch dimension: a CPU's compiler would copy its cache at every token.
        x = x[0] if B * candidates == 1 else jnp.repeat(x, candidates, axis=0)
        return sharding.constrain(x, *CACHE_AXES[-x.ndim :])

    last = jnp.repeat(lengths - 1, candidates)  # [R]
    place = DecodePosition(last, jnp.int32(T), jnp.arange(size) < last[:, None])
    return jax.tree.map(hold, caches), place
