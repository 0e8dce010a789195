"""Features of a frozen model: hidden states at the codes of an image, pooled or at each code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvm.common.errors import UserError

POOLS = ("mean", "last", "codes")


@dataclasses.dataclass(frozen=True)
class Readout:
    """The features of a layer, from its hidden states.

    Attributes:
      pools: "mean" is the mean over an image's codes, "last" the hidden state at the last one, "codes" all of them.
      first: position of the first code in its row.
      num_codes: codes of an image, N.
    """

    pools: tuple[str, ...]
    first: int
    num_codes: int

    def __call__(self, x: Float[Array, "B T D"]) -> dict[str, Float[Array, "B *_ D"]]:
        """Returns float32 [B, D] of "mean"; [B, D] of "last" and [B, N, D] of "codes" in the dtype of `x`."""
        codes = jax.lax.slice_in_dim(x, self.first, self.first + self.num_codes, axis=1)
        pooled = {"mean": codes.astype(jnp.float32).mean(1), "last": codes[:, -1], "codes": codes}
        return {pool: pooled[pool] for pool in self.pools}


def check_pools(pools: Sequence[str]) -> tuple[str, ...]:
    """Returns the pools. Raises UserError if there are none, or for an unknown one."""
    if not pools or set(pools) - set(POOLS):
        raise UserError(f"pools={','.join(pools)!r} must be some of {', '.join(POOLS)}")
    return tuple(pools)


def check_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Returns the layers, all if None. Raises UserError for one that the model lacks."""
    chosen = tuple(range(num_layers + 1) if layers is None else layers)
    if not chosen or min(chosen) < 0 or max(chosen) > num_layers:
        listed = ",".join(map(str, chosen))
        raise UserError(f"layers={listed} must be from 0 (the embedding) to {num_layers} (after the last layer)")
    return chosen


def feature_tokens(codes: Int[np.ndarray, "B N"], bos: int | None, copies: int) -> Int[np.ndarray, "B S"]:
    """Rows of BOS, if there is one, and `copies` of each image."""
    tokens = np.tile(codes, (1, copies))
    return tokens if bos is None else np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos)
