"""The convolution of encoder, decoder and discriminators."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Conv(nnx.Module):
    """A 2-D convolution with float32 parameters that runs in `dtype`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dtype: str, rngs: nnx.Rngs,
        *, bias: bool = True, stride: int = 1, padding: Any = "SAME",
    ):  # fmt: skip
        initial = nnx.initializers.lecun_normal()(rngs.params(), (kernel, kernel, inputs, outputs))
        self.kernel = nnx.Param(initial, axes=(None, None, None, None))
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None,)) if bias else None
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B h w outputs"]:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            # Codes need true float32, not the TF32 that GPUs use by default.
            precision="highest" if self.dtype == "float32" else None,
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
