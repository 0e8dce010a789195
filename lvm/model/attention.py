"""Causal attention and its kernels: splash on TPU, cuDNN flash on GPU, blocked XLA on CPU.

Under a mesh, batch and heads are sharded. A sharded sequence is exchanged for sharded heads around the kernel
(all-to-all), so that every kernel sees whole rows with a plain causal mask and devices share the triangle equally.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from lvm.common.errors import UserError
from lvm.hardware import sharding

KERNELS = ("auto", "xla", "splash", "cudnn")
CHECKPOINT_NAME = "attention"  # `checkpoint_name` of the kernels' outputs, for remat policies
_XLA_BLOCK = 128  # queries per block
_SPLASH_LANES = 128  # splash takes lengths and head dims in multiples of this
_SPLASH_BLOCKS = (512, 256, 128)  # queries and keys per splash block: the largest that divides the length
_CUDNN_MULTIPLE, _CUDNN_MAX_HEAD_DIM = 8, 128  # supported by cuDNN flash attention on every GPU that has it


def choose_kernel(kernel: str, platform: str, dtype: str, head_dim: int, segmented: bool = False) -> str:
    """Resolves `auto` and checks that the kernel can run.

    `auto` is splash on TPU, cuDNN on GPU for bfloat16 and the head dims that it supports, else XLA.

    Args:
      kernel: one of `KERNELS`.
      platform: "cpu", "gpu" or "tpu".
      dtype: "float32" or "bfloat16".
      head_dim: of the model; kernels pad it to a size they support.
      segmented: rows pack several sentences that must not attend to each other.

    Raises:
      UserError: an unknown kernel, or one that cannot run there.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention={kernel!r} must be one of {', '.join(KERNELS)}")
    if kernel == "auto":
        has_cudnn = dtype == "bfloat16" and head_dim <= _CUDNN_MAX_HEAD_DIM
        kernel = {"tpu": "splash", "gpu": "cudnn" if has_cudnn else "xla"}.get(platform, "xla")
    problem = ""
    if kernel == "splash" and platform != "tpu":
        problem = f"needs a TPU, this is {platform}; use auto or xla"
    elif kernel == "cudnn" and platform != "gpu":
        problem = f"needs a GPU, this is {platform}; use auto or xla"
    elif kernel == "cudnn" and dtype != "bfloat16":
        problem = f"computes in bfloat16, dtype is {dtype}; use auto or xla"
    elif kernel == "cudnn" and head_dim > _CUDNN_MAX_HEAD_DIM:
        problem = f"supports head dims up to {_CUDNN_MAX_HEAD_DIM}, this is {head_dim}; use xla"
    elif kernel == "cudnn" and segmented:
        problem = "cannot mask packed sentences; use packing=concat, or xla if the context is short"
    if problem:
        raise UserError(f"attention={kernel} {problem}")
    return kernel


@jax.named_scope("attention")  # separates these matmuls from the others in a profile
def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    kernel: str,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal softmax attention over whole rows, with grouped key-value heads.

    Scores are scaled by 1/√D; the softmax is in float32, the output in the dtype of `query`. K must divide H.

    Args:
      kernel: "xla", "splash" or "cudnn", from `choose_kernel`.
      segment_ids: tokens attend within their own segment; None is one segment.
      interpret: runs the splash kernel in interpret mode, on any device.

    Raises:
      UserError: a sharded sequence whose devices do not divide the heads.
    """

    def attend_local(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> jax.Array:
        if kernel == "splash":
            return _attend_splash(query, key, value, segments, interpret)
        is_cudnn = kernel == "cudnn"
        out = _attend_cudnn(query, key, value) if is_cudnn else _attend_xla(query, key, value, segments)
        return checkpoint_name(out, CHECKPOINT_NAME)

    mesh = sharding.current_mesh()
    if mesh is None:
        return attend_local(query, key, value, segment_ids)
    size, tensor, heads = mesh.shape["sequence"], mesh.shape["tensor"], query.shape[2]
    if heads % (size * tensor):
        raise UserError(f"config.mesh: sequence × tensor = {size} × {tensor} must divide the {heads} heads")
    sharded = sharding.partition_spec(("batch", "length", "heads", "head_dim"))
    rows = None if segment_ids is None else sharding.partition_spec(("batch", "length"))
    return jax.shard_map(
        lambda *arrays: _exchange_heads(attend_local, size, *arrays),
        in_specs=(sharded, sharded, sharded, rows),
        out_specs=sharded,
        check_vma=False,  # Pallas calls do not declare the axes over which their outputs vary
    )(query, key, value, segment_ids)


def _exchange_heads(
    function: Callable[..., jax.Array],
    size: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """Inside a `shard_map`: [B, T/size, H, D] per device → whole rows of H/size heads → back."""
    if size == 1:
        return function(query, key, value, segments)
    repeats = size // math.gcd(size, key.shape[2])  # fewer key-value heads than devices: replicate them
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    query, key, value = (
        jax.lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True) for x in (query, key, value)
    )
    if segments is not None:
        segments = jax.lax.all_gather(segments, "sequence", axis=1, tiled=True)
    out = function(query, key, value, segments)  # [B, T, H/size, D]
    return jax.lax.all_to_all(out, "sequence", split_axis=1, concat_axis=2, tiled=True)


def _attend_splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, interpret: bool
) -> jax.Array:
    """Splash attention, zero-padded in T and D to what it supports, scaled by the true D."""
    _, T, H, D = query.shape
    length, size = _round_up(T, _SPLASH_LANES), _round_up(D, _SPLASH_LANES)
    query = (query.astype(jnp.float32) / math.sqrt(D)).astype(query.dtype)
    # Padded keys come after every real query and padded queries are cut off, so neither needs a mask.
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, size - D))).transpose(0, 2, 1, 3) for x in (query, key, value)
    )  # [B, H, length, size], [B, K, length, size]
    block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
    operands = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    block_sizes: dict[str, Any] = {f"block_{operand}": block for operand in operands}
    run = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * H),
        block_sizes=splash.BlockSizes(**block_sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    segment_ids = None
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, length - T)))
        segment_ids = splash.SegmentIds(q=segments, kv=segments)
    out = jax.vmap(run)(query, key, value, segment_ids)  # [B, H, length, size]
    return out[:, :, :T, :D].transpose(0, 2, 1, 3)


def _attend_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN flash attention, zero-padded in D to what it supports, scaled by the true D."""
    D = query.shape[3]
    padding = ((0, 0), (0, 0), (0, 0), (0, _round_up(D, _CUDNN_MULTIPLE) - D))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, scale=1 / math.sqrt(D), is_causal=True, implementation="cudnn"
    )
    return out[..., :D]


def _attend_xla(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Attention by blocks of queries against the keys up to the block's end.

    Half the FLOPs of a masked T × T matrix, which is never materialized. Each block is one batched matmul over
    (batch, key-value head), the layout that is fastest on CPU.
    """
    B, T, H, D = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, T, D]
    blocks = []
    for start in range(0, T, _XLA_BLOCK):
        end = min(start + _XLA_BLOCK, T)
        rows = grouped[:, :, :, start:end].reshape(B, K, -1, D)  # [B, K, G·b, D]
        scores = jnp.matmul(rows, keys[:, :, :end].mT, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, H // K, end - start, end) / math.sqrt(D)  # [B, K, G, b, end]
        mask = jnp.arange(end) <= jnp.arange(start, end)[:, None]  # [b, end]
        if segments is not None:
            same = segments[:, start:end, None] == segments[:, None, :end]  # [B, b, end]
            mask = (mask & same)[:, None, None]  # [B, 1, 1, b, end]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(value.dtype)
        out = weights.reshape(B, K, -1, end) @ values[:, :, :end]  # [B, K, G·b, D]
        blocks.append(out.reshape(B, H, end - start, D))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3)  # [B, T, H, D]


@jax.named_scope("attention")
def attend_cache(
    query: Float[Array, "B H D"],
    key: Float[Array, "*batch K S D"],
    value: Float[Array, "*batch K S D"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B H D"]:
    """Attention of one new token per row over a KV cache that already holds it; the softmax is in float32.

    The slots of a head are contiguous, so that its products read memory in order. A single row's cache has no batch
    dimension. `visible` marks the slots that each row attends to. K must divide H.
    """
    B, _, D = query.shape
    grouped = query.reshape(*key.shape[:-2], -1, D)  # [(B,) K, G, D]
    # An einsum, because XLA on CPU would materialize `key.mT`.
    scores = jnp.einsum("...gd,...sd->...gs", grouped, key, preferred_element_type=jnp.float32)
    mask = jnp.expand_dims(visible, range(1, key.ndim - 1))  # [B, 1, (1,) S]
    weights = jax.nn.softmax(jnp.where(mask, scores / math.sqrt(D), -jnp.inf)).astype(value.dtype)
    return jnp.einsum("...gs,...sd->...gd", weights, value).reshape(B, -1, D)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
