"""Causal attention: one function, and the kernel behind it."""

from __future__ import annotations

from typing import Literal, cast

import jax

from lvm.errors import UserError

KERNELS = ("auto", "xla", "cudnn")
_Implementation = Literal["xla", "cudnn"]


def choose_kernel(kernel: str, platform: str) -> str:
    """The kernel that will run on `platform` ("cpu", "gpu", "tpu"): `auto` is cuDNN flash on GPU, else XLA.

    Raises:
      UserError: an unknown kernel, or one that can't run on the platform.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention: {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel == "cudnn" and platform != "gpu":
        raise UserError(f"attention: cudnn needs a GPU, this is {platform}; use auto or xla")
    if kernel == "auto":
        return "cudnn" if platform == "gpu" else "xla"
    return kernel


def attend(query: jax.Array, key: jax.Array, value: jax.Array, kernel: str) -> jax.Array:
    """Causal softmax attention with grouped key-value heads.

    Args:
      query: [B, T, H, D].
      key, value: [B, T, K, D], H divisible by K.
      kernel: "xla" or "cudnn", as `choose_kernel` gave it.

    Returns:
      [B, T, H, D] in the dtype of `query`; scores are scaled by 1/√D, the softmax is in float32.
    """
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=cast(_Implementation, kernel)
    )


def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of new tokens to a cache.

    Args:
      query: [B, T, H, D].
      key, value: [B, S, K, D].
      mask: bool [B, 1, T, S], True where a query may look.

    Returns:
      [B, T, H, D].
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
