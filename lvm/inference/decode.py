"""Compiled programs of generation: prefill, decode and re-prefill, over a KV cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from lvm.hardware import sharding
from lvm.inference.decode_params import build_module
from lvm.inference.sampling import BatchedSampling, sample_token
from lvm.model.nnx_utils import Params
from lvm.model.transformer import CACHE_AXES, Cache, DecodePosition, ModelConfig


class Program(NamedTuple):
    """Static arguments that all programs of a generator share; `kernel` is the attention kernel of prefill."""

    config: ModelConfig
    mesh: Mesh | None
    kernel: str


class DecodeState(NamedTuple):
    """Rows being decoded.

    Attributes:
      caches: KV cache of each layer, S slots per row.
      position: of `token`; earlier slots are visible, padding is not.
      token: the newest token, not in the caches yet.
      num_generated: tokens generated so far.
      generated: those tokens, padded to the most that may be generated.
    """

    caches: list[Cache]
    position: DecodePosition
    token: Int[Array, " R"]
    num_generated: Int[Array, ""]
    generated: Int[Array, "R A"]


@functools.partial(jax.jit, static_argnames=("program", "cache_size", "candidates", "max_new_tokens"))
def prefill(
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    program: Program,
    cache_size: int,
    candidates: int,
    max_new_tokens: int,
) -> DecodeState:
    """Prefills padded prompts of `lengths`, each once for its `candidates` rows of `cache_size` > T slots.

    `params` are from `prepare_params`.
    """
    with sharding.use_mesh(program.mesh):
        caches, position = _fill_caches(params, prompts, lengths, program, cache_size, candidates)
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]  # [B]
        generated = jnp.zeros((len(last) * candidates, max_new_tokens), jnp.int32)
        return DecodeState(caches, position, jnp.repeat(last, candidates), jnp.int32(0), generated)


@functools.partial(jax.jit, static_argnames=("program", "num_allowed"), donate_argnames="state")
def decode(
    params: Params,
    state: DecodeState,
    sampling: BatchedSampling,
    num_steps: Int[Array, ""],
    *,
    program: Program,
    num_allowed: int,
) -> DecodeState:
    """Runs `num_steps` decode steps in one loop; only ids below `num_allowed` are sampled."""
    with sharding.use_mesh(program.mesh):

        def step(state: DecodeState) -> DecodeState:
            # Built inside the loop: the views of an outer module would be copied.
            model = build_module(params, program.config)
            position, slot, visible = state.position
            visible |= jnp.arange(visible.shape[1]) == slot
            hidden, caches = model.decode_step(state.token, DecodePosition(position, slot, visible), state.caches)
            logits = model.logits(hidden)[:, :num_allowed]  # [R, allowed]
            token, index = sample_token(logits, sampling, state.num_generated), state.num_generated
            generated = jax.lax.dynamic_update_slice(state.generated, token[:, None], (0, index))
            return DecodeState(caches, DecodePosition(position + 1, slot + 1, visible), token, index + 1, generated)

        end = state.num_generated + num_steps
        return jax.lax.while_loop(lambda state: state.num_generated < end, step, state)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def re_prefill(
    params: Params, state: DecodeState, windows: Int[Array, "R T"], lengths: Int[Array, " R"], *, program: Program
) -> DecodeState:
    """Replaces the caches by those of padded windows of `lengths`, each ending with the row's newest token."""
    with sharding.use_mesh(program.mesh):
        cache_size = state.position.visible.shape[1]
        caches, position = _fill_caches(params, windows, lengths, program, cache_size, candidates=1)
        return state._replace(caches=caches, position=position)


def _fill_caches(
    params: Params, tokens: jax.Array, lengths: jax.Array, program: Program, cache_size: int, candidates: int
) -> tuple[list[Cache], DecodePosition]:
    """Prefills rows [B, T]; returns caches of `cache_size` slots and the position of each row's last token."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    model = build_module(params, program.config)
    _, caches = model.prefill(tokens, positions, program.kernel)  # each [B, K, T, d]

    def expand(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, cache_size - T), (0, 0)))
        # A single row has no batch dimension: with one, XLA for CPU copies the cache at every token.
        x = x[0] if B * candidates == 1 else jnp.repeat(x, candidates, axis=0)
        return sharding.constrain(x, *CACHE_AXES[-x.ndim :])

    last = jnp.repeat(lengths - 1, candidates)  # [R]
    position = DecodePosition(last, jnp.int32(T), jnp.arange(cache_size) < last[:, None])
    return jax.tree.map(expand, caches), position
