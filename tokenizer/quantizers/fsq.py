"""Finite scalar quantization."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvm.common.errors import UserError
from lvm.model.nnx_utils import Params
from tokenizer.quantizers.base import Quantized, Quantizer, mean_square
from tokenizer.quantizers.gradients import straight_through


@dataclasses.dataclass(frozen=True)
class FSQ(Quantizer):
    """Every channel is bounded and rounded to a few levels (FSQ, arXiv 2309.15505); no parameters and no losses.

    The first channel is the least significant digit of a code.

    Attributes:
      levels: of each channel; their product is `codebook_size`, their number `codebook_dim`. The paper has (8, 6, 5)
        for 2^8 codes, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12, (8, 8, 8, 6, 5) for 2^14, (8, 8, 8, 5, 5, 5) for
        2^16.
    """

    kind: ClassVar[str] = "fsq"
    code_fields: ClassVar[tuple[str, ...]] = ("levels",)
    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if min(self.levels, default=0) < 2:
            raise UserError(f"levels={self.levels} must be at least 2, one per channel of the latents")

    @property
    def fixed_size(self) -> tuple[int, int]:
        """See `Quantizer.fixed_size`."""
        return math.prod(self.levels), len(self.levels)

    def prepare(self, latents: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        """Bounds each channel, so that rounding in steps of 2 / (levels, rounded down to even) gives its levels."""
        levels = np.array(self.levels)
        half_width = (levels - 1) * (1 + 1e-3) / 2  # a margin, lest tanh's limit round to one level too few
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        bounded = jnp.tanh(latents + np.arctanh(offset / half_width)) * half_width - offset
        return (bounded / (levels // 2)).astype(jnp.float32)

    def quantize(self, params: Params, latents: Float[Array, "*n C"]) -> Quantized:
        """Rounds to levels; see `Quantizer.quantize`."""
        half = np.array(self.levels) // 2
        digits = jnp.round(jax.lax.stop_gradient(latents) * half).astype(jnp.int32) + half
        vectors = self._vectors(digits)
        error = mean_square(latents - vectors)
        codes = jnp.sum(digits * self._place_values(), -1).astype(jnp.int32)
        return Quantized(codes, straight_through(latents, vectors), {}, {"quantization_error": error})

    def lookup(self, params: Params, codes: Int[Array, "*n"]) -> Float[Array, "*n C"]:
        """Levels of the codes, in [−1, 1]; see `Quantizer.lookup`."""
        codes = jnp.clip(codes, 0, math.prod(self.levels) - 1)
        return self._vectors(codes[..., None] // self._place_values() % np.array(self.levels))

    def _place_values(self) -> Int[np.ndarray, " C"]:
        return np.cumprod((1, *self.levels[:-1]))

    def _vectors(self, digits: Int[Array, "*n C"]) -> Float[Array, "*n C"]:
        half = np.array(self.levels) // 2
        return ((digits - half) / half).astype(jnp.float32)
