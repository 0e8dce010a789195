"""Layers of classifiers as functions of torchvision's parameters, at inference."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvm.model.nnx_utils import Params


def conv(
    params: Params, x: Float[Array, "B H W I"], dtype: str, *, stride: int = 1, padding: Any = "SAME", groups: int = 1
) -> Float[Array, "B h w O"]:
    """A convolution in `dtype`."""
    y = jax.lax.conv_general_dilated(
        x.astype(dtype), params["weight"].astype(dtype), (stride, stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        precision="highest" if dtype == "float32" else None,
    )  # fmt: skip
    return y + params["bias"].astype(dtype) if "bias" in params else y


def linear(params: Params, x: Float[Array, "*n I"], dtype: str) -> Float[Array, "*n O"]:
    """A matrix product in `dtype`."""
    precision = "highest" if dtype == "float32" else None
    return jnp.matmul(x.astype(dtype), params["weight"].astype(dtype), precision=precision) + params["bias"].astype(
        dtype
    )


def batch_norm(params: Params, x: Float[Array, "B H W C"], epsilon: float = 1e-5) -> Float[Array, "B H W C"]:
    """Batch normalization by the running statistics, float32."""
    scale = params["weight"] * jax.lax.rsqrt(params["running_var"] + epsilon)
    return ((x.astype(jnp.float32) - params["running_mean"]) * scale + params["bias"]).astype(x.dtype)


def layer_norm(params: Params, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Normalization over channels (epsilon 1e-6), float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return (y * params["weight"] + params["bias"]).astype(x.dtype)


def max_pool(x: Float[Array, "B H W C"], size: int, stride: int, padding: int = 0) -> Float[Array, "B h w C"]:
    """Maxima of windows."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)
