"""Causal attention: one function, and the kernel behind it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lvm.errors import UserError

KERNELS = ("auto", "xla", "cudnn")
_BLOCK = 128  # queries


def choose_kernel(kernel: str, platform: str, dtype: str) -> str:
    """The kernel that will run on `platform` ("cpu", "gpu", "tpu") in `dtype` ("float32", "bfloat16").

    `auto` is cuDNN flash for bfloat16 on GPU, else XLA.

    Raises:
      UserError: an unknown kernel, or one that can't run there.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention: {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel == "auto":
        return "cudnn" if platform == "gpu" and dtype == "bfloat16" else "xla"
    if kernel == "cudnn" and platform != "gpu":
        raise UserError(f"attention: cudnn needs a GPU, this is {platform}; use auto or xla")
    if kernel == "cudnn" and dtype != "bfloat16":
        raise UserError(f"attention: cudnn computes in bfloat16, dtype is {dtype}; use auto or xla")
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
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
    return _attend_by_blocks(query, key, value)


def _attend_by_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Plain attention, a block of queries at a time against the keys up to its end.

    Half the work of masking a whole T × T matrix, and never one in memory. Each block's product is one batched
    matrix product over (batch, key-value head), which is what CPUs run fast.
    """
    B, T, H, D = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, T, D]
    blocks = []
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        rows = grouped[:, :, :, start:end].reshape(B, K, -1, D)  # [B, K, G·b, D]
        scores = jnp.matmul(rows, keys[:, :, :end].mT, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, H // K, end - start, end) / math.sqrt(D)  # [B, K, G, b, end]
        causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]  # [b, end]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(value.dtype)
        out = weights.reshape(B, K, -1, end) @ values[:, :, :end]  # [B, K, G·b, D]
        blocks.append(out.reshape(B, H, end - start, D))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3)  # [B, T, H, D]


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
