"""Prompts → codes: a prompt is read once into a KV cache, then one compiled loop writes code after code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lvm.common.distributed import fetch
from lvm.common.errors import UserError
from lvm.inference import decode
from lvm.inference.decode_params import decode_mesh, prepare_params
from lvm.inference.sampling import SamplingParams, batch_sampling
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import Params
from lvm.model.transformer import ModelConfig

__all__ = ["Generator", "SamplingParams", "SlidingWindow"]

_MULTIPLE = 128  # lengths are padded to multiples of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """How writing goes on when the context is full: the oldest grids go, the rest is read anew from place 0 on.

    Attributes:
      codes_per_image: N.
      bos: what stays in front; None where the vocabulary has no BOS.
      drop: grids that go at once; 0 is half of those that fit.
    """

    codes_per_image: int
    bos: int | None
    drop: int = 0

    def max_grids(self, context: int) -> int:
        """Grids of a prompt and its answer together; the last code written is never read."""
        return (context + 1 - len(self.front)) // self.codes_per_image

    @property
    def front(self) -> list[int]:
        return [] if self.bos is None else [self.bos]

    def checked(self, context: int) -> SlidingWindow:
        """With `drop` as a number from 1 on.

        Raises:
          UserError: `drop` leaves no grid of those that fit.
        """
        fit = self.max_grids(context)
        drop = self.drop or max(1, fit // 2)
        if not 0 < drop < max(fit, 2):
            raise UserError(
                f"drop: {self.drop} grids of the {fit} that fit the context; wanted 1 to {fit - 1}"
            )
        return dataclasses.replace(self, drop=drop)


class Generator:
    """A transformer that is ready to write.

    Holds the weights once more: in the compute dtype, a layer by itself, over the mesh.

    Args:
      config: the model.
      params: a `Transformer`'s parameters, as training has them.
      mesh: devices that share rows, heads and weights; None is where the parameters are.

    Raises:
      UserError: the mesh doesn't divide the model.
    """

    def __init__(self, config: ModelConfig, params: Params, mesh: Mesh | None = None):
        self.config, self._mesh = config, decode_mesh(mesh)
        self._ways = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._kernel = choose_kernel(config.attention, platform, config.dtype, config.head_dim)
        self._weights = prepare_params(params, config, self._mesh)
        self._where = {"config": config, "mesh": self._mesh}

    def __call__(self, *args: Any, **options: Any) -> np.ndarray:
        """All that `stream` writes, at once: int32 [B, candidates, length]."""
        *_, last = self.stream(*args, **options)
        return last

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        length: int,
        sampling: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
        candidates: int = 1,
        num_allowed: int | None = None,
        window: SlidingWindow | None = None,
        every: int = 0,
    ) -> Iterator[np.ndarray]:
        """Continues prompts of equal or unequal length, and shows what is written so far.

        A row's result depends on its own prompt, sampling and seed alone, not on the rows beside it.

        Args:
          prompts: B arrays int32 [S_i], S_i ≥ 1.
          length: new tokens a prompt.
          sampling: how tokens are drawn, for all or each.
          seeds: B numbers.
          candidates: continuations a prompt; they share its reading.
          num_allowed: only ids below this are drawn; None allows all.
          window: prompts are `window.front` and whole grids, and the window slides when the context is full.
            Without one, prompt and answer must fit.
          every: tokens between two looks; 0 shows the end alone.

        Yields:
          int32 [B, candidates, tokens so far].

        Raises:
          UserError: no prompt or an empty one, fewer than one new token, or what is longer than the context.
        """
        window = window.checked(self.config.context) if window else None
        lengths = self._checked_lengths(prompts, length, window)  # [B]
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if not len(prompts) == len(samplings) == len(seeds):
            raise UserError(
                f"{len(prompts)} prompts, {len(samplings)} ways of sampling and {len(seeds)} seeds; one for each prompt"
            )
        B, extra = len(prompts), -len(prompts) % self._ways  # rows that make the batch divisible are left out
        prompts, seeds = _repeat_last(prompts, extra), _repeat_last(seeds, extra)
        rules = batch_sampling(_repeat_last(samplings, extra), seeds, candidates)
        fill = np.repeat(_repeat_last(lengths, extra), candidates)  # [R] tokens in each row's window
        # The last new token is never read.
        limit = self.config.context + 1
        if window is not None:
            limit = len(window.front) + window.max_grids(self.config.context) * window.codes_per_image
        longest = int(fill.max())
        # A slide reads rows of any length below the limit anew, and its padding goes to the next multiple.
        places = _round_up(longest) + length if longest + length <= limit else limit + _MULTIPLE
        state = decode.prefill(
            self._weights,
            *_padded(prompts),
            size=_round_up(places),
            candidates=candidates,
            room=_round_up(length),
            kernel=self._kernel,
            **self._where,
        )
        done = 0
        while done < length:
            if window is not None and (fill == limit).any():
                state, fill = self._slide(state, prompts, done, fill, limit, window)
            steps = min(length - done, int(limit - fill.max()), every or length)
            state = decode.decode(
                self._weights,
                state,
                rules,
                np.int32(steps),
                num_allowed=num_allowed or self.config.vocabulary_size,
                **self._where,
            )
            done, fill = done + steps, fill + steps
            if every or done == length:
                yield fetch(state.written)[: B * candidates, :done].reshape(B, candidates, done)

    def _slide(
        self,
        state: decode.DecodeState,
        prompts: Sequence[np.ndarray],
        done: int,
        fill: np.ndarray,
        limit: int,
        window: SlidingWindow,
    ) -> tuple[decode.DecodeState, np.ndarray]:
        """Full rows keep their newest grids; all rows are read anew, so that they go on at one place of the cache."""
        written, candidates = fetch(state.written)[:, :done], len(fill) // len(prompts)
        fill = np.where(fill == limit, fill - window.drop * window.codes_per_image, fill)  # [R]
        windows = []
        for row, size in enumerate(fill):
            history = np.concatenate([prompts[row // candidates], written[row]])
            newest = history[len(history) - (size - len(window.front)) :]
            windows.append(np.concatenate([window.front, newest]))
        state = decode.re_prefill(self._weights, state, *_padded(windows), kernel=self._kernel, **self._where)
        return state, fill

    def _checked_lengths(
        self, prompts: Sequence[np.ndarray], length: int, window: SlidingWindow | None
    ) -> list[int]:
        if length < 1:
            raise UserError(f"length: {length} new tokens; at least 1")
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) < 1:
            raise UserError(
                "a prompt is empty; give at least one token" if lengths else "no prompt was given"
            )
        wanted = length if window is None else window.codes_per_image
        if (needed := max(lengths) + wanted - 1) > self.config.context:
            raise UserError(
                f"a prompt of {max(lengths)} tokens and {wanted} new ones need a context of {needed}; "
                f"the model has {self.config.context}"
            )
        return lengths


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array int32 [B, T], and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), _round_up(int(lengths.max()))), np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded, lengths


def _repeat_last(values: Sequence[Any], times: int) -> list[Any]:
    return [*values, *[values[-1]] * times]


def _round_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
