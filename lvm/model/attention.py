"""Causal attention: one function, and the kernel behind it.

Splash attention on TPU, cuDNN flash on GPU, plain XLA by blocks of queries on CPU. Under a mesh, batch and heads
are split; a split sequence is exchanged for split heads around the kernel (all-to-all), so that every kernel sees
whole rows: its causal mask stays the plain one, and every device does the same share of the triangle.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from lvm.common.errors import UserError
from lvm.hardware import sharding

KERNELS = ("auto", "xla", "splash", "cudnn")
CHECKPOINT_NAME = "attention"  # the name under which a kernel's results are known to rematerialisation
_BLOCK = 128  # queries of the plain kernel at a time
_SPLASH_LANES = 128  # splash takes rows and heads in multiples of it
_SPLASH_BLOCKS = (512, 256, 128)  # queries, and keys, of one splash step: the largest that fits
_CUDNN_MULTIPLE, _CUDNN_LARGEST = (
    8,
    128,
)  # head dims that cuDNN takes on every GPU that has its flash attention


def choose_kernel(
    kernel: str, platform: str, dtype: str, head_dim: int = 128, segmented: bool = False
) -> str:
    """The kernel that will run.

    `auto` is splash on TPU, cuDNN flash for bfloat16 on GPU, else XLA.

    Args:
      kernel: one of `KERNELS`.
      platform: "cpu", "gpu" or "tpu".
      dtype: "float32" or "bfloat16".
      head_dim: of the model; kernels pad it to what they take.
      segmented: whether rows hold several sentences that must not see each other.

    Raises:
      UserError: an unknown kernel, or one that can't run there.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention: {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel == "auto":
        on_gpu = "cudnn" if dtype == "bfloat16" else "xla"
        kernel = {"tpu": "splash", "gpu": on_gpu}.get(platform, "xla")
    if kernel == "splash" and platform != "tpu":
        raise UserError(f"attention: splash needs a TPU, this is {platform}; use auto or xla")
    if kernel != "cudnn":
        return kernel
    if platform != "gpu":
        raise UserError(f"attention: cudnn needs a GPU, this is {platform}; use auto or xla")
    if dtype != "bfloat16":
        raise UserError(f"attention: cudnn computes in bfloat16, dtype is {dtype}; use auto or xla")
    if head_dim > _CUDNN_LARGEST:
        raise UserError(
            f"attention: cudnn takes heads of up to {_CUDNN_LARGEST}, these have {head_dim}; use xla"
        )
    if segmented:
        raise UserError(
            "attention: cudnn can't keep the sentences of a row apart; use rows of `concat`, or xla where the "
            "context is short"
        )
    return kernel


@jax.named_scope("attention")  # so that a profile tells its products from the others
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel: str,
    segment_ids: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention with grouped key-value heads, over whole rows.

    Args:
      query: [B, T, H, D].
      key, value: [B, T, K, D], H divisible by K.
      kernel: "xla", "splash" or "cudnn", as `choose_kernel` gave it.
      segment_ids: int32 [B, T]; a token sees those of its own segment. None is one segment.
      interpret: runs splash's kernel by an interpreter, on any device.

    Returns:
      [B, T, H, D] in the dtype of `query`; scores are scaled by 1/√D, the softmax is in float32.

    Raises:
      UserError: a split sequence whose devices don't divide the heads.
    """

    def local(query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
        if kernel == "splash":
            return _attend_splash(query, key, value, segments, interpret)
        attended = (
            _attend_cudnn(query, key, value)
            if kernel == "cudnn"
            else _attend_xla(query, key, value, segments)
        )
        return checkpoint_name(attended, CHECKPOINT_NAME)

    mesh = sharding.current_mesh()
    if mesh is None:
        return local(query, key, value, segment_ids)
    ways = mesh.shape["sequence"]
    if query.shape[2] % (ways * mesh.shape["tensor"]):
        raise UserError(
            f"config.mesh: sequence × tensor = {ways} × {mesh.shape['tensor']} doesn't divide {query.shape[2]} heads"
        )
    heads = sharding.partition_spec(("batch", "length", "heads", "head_dim"))
    rows = None if segment_ids is None else sharding.partition_spec(("batch", "length"))
    return jax.shard_map(
        lambda *arrays: _whole_rows(local, ways, *arrays),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,  # Pallas calls don't say over which axes their results vary
    )(query, key, value, segment_ids)


def _whole_rows(local: Any, ways: int, query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
    """Inside a `shard_map`: [B, T/ways, H, D] of each device → all of T for H/ways heads → back."""
    if ways == 1:
        return local(query, key, value, segments)
    repeats = ways // math.gcd(
        ways, key.shape[2]
    )  # fewer key-value heads than devices: each is sent to several
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    query, key, value = (
        jax.lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True)
        for x in (query, key, value)
    )
    if segments is not None:
        segments = jax.lax.all_gather(segments, "sequence", axis=1, tiled=True)
    out = local(query, key, value, segments)  # [B, T, H/ways, D]
    return jax.lax.all_to_all(out, "sequence", split_axis=1, concat_axis=2, tiled=True)


def _attend_splash(query: Any, key: Any, value: Any, segments: Any, interpret: bool) -> jax.Array:
    """Splash attention: [B, T, H, D] zero-padded in T and D to what it takes, scaled by the true D."""
    _, T, H, D = query.shape
    length, size = _round_up(T, _SPLASH_LANES), _round_up(D, _SPLASH_LANES)
    query = (query.astype(jnp.float32) / math.sqrt(D)).astype(query.dtype)
    # Padded keys come after every real query, and padded queries are cut off: neither needs a mask.
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, size - D))).transpose(0, 2, 1, 3)
        for x in (query, key, value)
    )  # [B, H, length, size], [B, K, length, size]
    block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
    run = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, length - T)))
        segments = splash.SegmentIds(q=segments, kv=segments)
    out = jax.vmap(run)(query, key, value, segments)  # [B, H, length, size]
    return out[:, :, :T, :D].transpose(0, 2, 1, 3)


def _attend_cudnn(query: Any, key: Any, value: Any) -> jax.Array:
    """cuDNN flash attention: D zero-padded to what it takes, scaled by the true D."""
    D = query.shape[3]
    padding = ((0, 0), (0, 0), (0, 0), (0, _round_up(D, _CUDNN_MULTIPLE) - D))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, scale=1 / math.sqrt(D), is_causal=True, implementation="cudnn"
    )
    return out[..., :D]


def _attend_xla(query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
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
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]  # [b, end]
        if segments is not None:
            same = segments[:, start:end, None] == segments[:, None, :end]  # [B, b, end]
            visible = (visible & same)[:, None, None]  # [B, 1, 1, b, end]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(value.dtype)
        out = weights.reshape(B, K, -1, end) @ values[:, :, :end]  # [B, K, G·b, D]
        blocks.append(out.reshape(B, H, end - start, D))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3)  # [B, T, H, D]


@jax.named_scope("attention")
def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of one new token a row to a cache that holds it already.

    Places lie one after the other for each head, so that a row's product with them reads memory in order.

    Args:
      query: [B, H, D].
      key, value: [B, K, S, D], H divisible by K; or [K, S, D] for a lone row.
      visible: bool [B, S], the places that a row sees.

    Returns:
      [B, H, D] in the dtype of `query`; the softmax is in float32.
    """
    B, _, D = query.shape
    grouped = query.reshape(*key.shape[:-2], -1, D)  # [(B,) K, G, D]
    # Not a product with `key.mT`, which a CPU would write out.
    scores = jnp.einsum("...gd,...sd->...gs", grouped, key, preferred_element_type=jnp.float32)
    seen = jnp.expand_dims(visible, range(1, key.ndim - 1))  # [B, 1, (1,) S]
    weights = jax.nn.softmax(jnp.where(seen, scores / math.sqrt(D), -jnp.inf)).astype(value.dtype)
    return jnp.einsum("...gs,...sd->...gd", weights, value).reshape(B, -1, D)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
