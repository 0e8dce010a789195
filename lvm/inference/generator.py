"""Generation: prompts are prefilled into a KV cache, then a compiled loop decodes token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from lvm.common.distributed import fetch
from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.inference import decode
from lvm.inference.decode_params import decode_mesh, prepare_params
from lvm.inference.sampling import SamplingParams, batch_sampling
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import Params
from lvm.model.transformer import ModelConfig

__all__ = ["Generator", "SamplingParams", "SlidingWindow"]

_MULTIPLE = 128  # lengths are padded to multiples of it, to bound the number of compiled programs


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Sliding-window policy: when the context is full, drop the oldest images and re-prefill from position 0.

    Attributes:
      codes_per_image: N.
      bos: kept in front; None if the vocabulary has no BOS.
      drop: images dropped at once; 0 is half of those that fit.
    """

    codes_per_image: int
    bos: int | None
    drop: int = 0

    @property
    def prefix(self) -> list[int]:
        return [] if self.bos is None else [self.bos]

    def max_grids(self, context: int) -> int:
        """Grids, prompt and answer together, that fit the context; the last code generated is never an input."""
        return (context + 1 - len(self.prefix)) // self.codes_per_image

    def max_tokens(self, context: int) -> int:
        """Tokens of the prefix and `max_grids`."""
        return len(self.prefix) + self.max_grids(context) * self.codes_per_image

    def resolve(self, context: int) -> SlidingWindow:
        """Replaces a `drop` of 0. Raises UserError if `drop` leaves none of the grids that fit."""
        limit = self.max_grids(context)
        drop = self.drop or max(1, limit // 2)
        if not 0 < drop < max(limit, 2):
            raise UserError(f"drop={self.drop} must be from 1 to {limit - 1}: the context holds {limit} images")
        return dataclasses.replace(self, drop=drop)


class Generator:
    """A transformer ready for generation.

    Holds its own copy of the weights: in the compute dtype, with unrolled layers, sharded over the mesh, whose devices
    share rows, heads and weights; without one, on the devices of `params`.

    Raises UserError if the mesh doesn't divide the model.
    """

    def __init__(self, config: ModelConfig, params: Params, mesh: Mesh | None = None):
        mesh = decode_mesh(mesh)
        self.config = config
        self._row_multiple = 1 if mesh is None else sharding.axis_size(mesh, ("data", "fsdp"))
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        kernel = choose_kernel(config.attention, platform, config.dtype, config.head_dim)
        self._params = prepare_params(params, config, mesh)
        self._program = decode.Program(config, mesh, kernel)

    def __call__(self, *args: Any, **options: Any) -> Int[np.ndarray, "B candidates num_tokens"]:
        """The final result of `stream`."""
        *_, last = self.stream(*args, **options)
        return last

    def stream(
        self,
        prompts: Sequence[Int[np.ndarray, " _"]],
        num_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
        candidates: int = 1,
        num_allowed: int | None = None,
        window: SlidingWindow | None = None,
        every: int = 0,
    ) -> Iterator[Int[np.ndarray, "B candidates _"]]:
        """Continues prompts of equal or unequal length.

        A row's result depends on its own prompt, sampling and seed alone, not on the rest of the batch.

        Args:
          prompts: B rows of at least one token.
          num_tokens: new tokens per prompt.
          sampling: one for all prompts or one each.
          seeds: one per prompt.
          candidates: continuations per prompt; they share its prefill.
          num_allowed: only ids below this are sampled; None allows all.
          window: applies if prompts are `window.prefix` and whole grids. Without one, prompt and answer must fit the
            context.
          every: new tokens between two yields; 0 yields the final result alone.

        Yields:
          All new tokens so far.

        Raises:
          UserError: no prompt or an empty one, no new token, or tokens that exceed the context.
        """
        window = window.resolve(self.config.context) if window else None
        lengths = self._check_lengths(prompts, num_tokens, window)  # [B]
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if not len(prompts) == len(params) == len(seeds):
            raise UserError(f"{len(prompts)} prompts, {len(params)} sampling params, {len(seeds)} seeds; give one each")
        # Rows that make the batch divisible are dropped from the result.
        B, padding = len(prompts), -len(prompts) % self._row_multiple
        prompts, seeds = _pad_rows(prompts, padding), _pad_rows(seeds, padding)
        batched = batch_sampling(_pad_rows(params, padding), seeds, candidates)
        fill = np.repeat(_pad_rows(lengths, padding), candidates)  # [R] tokens in each row's window
        # The last new token is never an input, so that a window may hold one more than the context.
        limit = window.max_tokens(self.config.context) if window else self.config.context + 1
        longest = int(fill.max())
        # Re-prefill pads rows of any length below the limit to the next multiple.
        slots = _round_up(longest) + num_tokens if longest + num_tokens <= limit else limit + _MULTIPLE
        state = decode.prefill(
            self._params,
            *_pad_tokens(prompts),
            program=self._program,
            cache_size=_round_up(slots),
            candidates=candidates,
            max_new_tokens=_round_up(num_tokens),
        )
        done, num_allowed = 0, num_allowed or self.config.vocabulary_size
        while done < num_tokens:
            if window is not None and (fill == limit).any():
                state, fill = self._slide(state, prompts, done, fill, limit, window)
            steps = min(num_tokens - done, int(limit - fill.max()), every or num_tokens)
            state = decode.decode(
                self._params, state, batched, np.int32(steps), program=self._program, num_allowed=num_allowed
            )
            done, fill = done + steps, fill + steps
            if every or done == num_tokens:
                yield fetch(state.generated)[: B * candidates, :done].reshape(B, candidates, done)

    def _slide(
        self,
        state: decode.DecodeState,
        prompts: Sequence[np.ndarray],
        done: int,
        fill: np.ndarray,
        limit: int,
        window: SlidingWindow,
    ) -> tuple[decode.DecodeState, np.ndarray]:
        """Drops the oldest grids of full rows and re-prefills all rows: they share the cache slot that comes next."""
        generated, candidates = fetch(state.generated)[:, :done], len(fill) // len(prompts)
        fill = np.where(fill == limit, fill - window.drop * window.codes_per_image, fill)  # [R]
        windows = []
        for row, size in enumerate(fill):
            history = np.concatenate([prompts[row // candidates], generated[row]])
            windows.append(np.concatenate([window.prefix, history[len(history) - (size - len(window.prefix)) :]]))
        return decode.re_prefill(self._params, state, *_pad_tokens(windows), program=self._program), fill

    def _check_lengths(self, prompts: Sequence[np.ndarray], num_tokens: int, window: SlidingWindow | None) -> list[int]:
        if num_tokens < 1:
            raise UserError(f"num_tokens={num_tokens} must be positive")
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) < 1:
            raise UserError(
                "a prompt is empty; give at least one token" if lengths else "no prompts; give at least one"
            )
        new = num_tokens if window is None else window.codes_per_image
        if (needed := max(lengths) + new - 1) > self.config.context:
            raise UserError(
                f"a prompt of {max(lengths)} tokens and {new} new ones need a context of {needed}; "
                f"the model has {self.config.context}"
            )
        return lengths


def _pad_tokens(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one padded array int32 [B, T], and their lengths int32 [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), _round_up(int(lengths.max()))), np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded, lengths


def _pad_rows(values: Sequence[Any], padding: int) -> list[Any]:
    """Repeats the last value `padding` times more."""
    return [*values, *[values[-1]] * padding]


def _round_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
