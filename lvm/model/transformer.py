"""The LLaMA-style decoder that learns the next code, with its named sizes.

RMSNorm before attention and MLP, rotary positions by half rotation, SwiGLU, no biases. Layers are stacked and
run by one `jax.lax.scan`; for writing they stand one by one, each with its own cache, which a scan would copy at
every token. Parameters are float32, compute is `dtype`; norms' statistics, rotary angles, softmax and logits are
float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.model import attention
from lvm.model.sharded_matmul import sharded_matmul


def _is_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether an operation gives the attention kernel's result, or the statistics that its backward pass needs."""
    # cuDNN's forward pass gives both at once and names neither.
    named = params.get("name") == attention.CHECKPOINT_NAME
    return named or primitive.name == "dot_product_attention_fwd_wrapper"


_policies = jax.checkpoint_policies
# What the backward pass doesn't recompute, from most memory to least.
REMAT_POLICIES = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _is_attention),
    "attention": _is_attention,
    "full": _policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder.

    Attributes:
      hidden_size, mlp_size, num_layers, num_heads: as in LLaMA.
      num_kv_heads: key-value heads, dividing `num_heads`; 0 means as many as `num_heads`.
      vocabulary_size: 0 means the vocabulary of the data (its codes and 256 more ids).
      context: the longest input, in tokens.
      tie_embeddings: the output projection is the embedding, transposed.
      dtype: compute type, "bfloat16" or "float32".
      attention: "auto", or a kernel of `lvm.model.attention.KERNELS`.
      depth_scaled_init: projections back to the residual stream start 1/√(2·num_layers) as large.
      remat: what the backward pass recomputes: "none" nothing, "dots" all but matrix products and attention,
        "attention" all but attention, "full" everything; "auto" is the first of these that fits in memory
        (`lvm.training.step`).
    """

    hidden_size: int = 1024
    mlp_size: int = 2688
    num_layers: int = 22
    num_heads: int = 8
    num_kv_heads: int = 0
    vocabulary_size: int = 0
    context: int = 4096
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    depth_scaled_init: bool = False
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "mlp_size", "num_layers", "num_heads", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("rope_theta", "norm_epsilon", "init_std"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        if self.num_kv_heads < 0:
            raise UserError(f"num_kv_heads: {self.num_kv_heads} is negative; 0 means as many as num_heads")
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise UserError(
                f"num_heads: {self.num_heads} heads don't divide hidden_size {self.hidden_size} into even parts"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads: {self.num_kv_heads} doesn't divide num_heads {self.num_heads}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype: {self.dtype!r} is not float32 or bfloat16")
        if self.remat not in ("auto", *REMAT_POLICIES):
            raise UserError(f"remat: {self.remat!r} is not one of auto, {', '.join(REMAT_POLICIES)}")
        if self.attention not in attention.KERNELS:
            raise UserError(f"attention: {self.attention!r} is not one of {', '.join(attention.KERNELS)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def residual_std(self) -> float:
        """The initial spread of projections back to the residual stream (GPT-2's rule where it is scaled)."""
        return self.init_std / (2 * self.num_layers) ** 0.5 if self.depth_scaled_init else self.init_std


def _size(hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(hidden_size=hidden, mlp_size=mlp, num_layers=layers, num_heads=heads)


SIZES: dict[str, ModelConfig] = {
    "debug": _size(128, 256, 2, 4),
    "100m": _size(640, 1664, 22, 10),
    "300m": _size(1024, 2688, 22, 8),
    "600m": _size(1536, 4096, 22, 16),
    "1b": _size(2048, 5504, 22, 16),
    "3b": _size(3200, 8640, 26, 32),
    "7b": _size(4096, 11008, 32, 32),
}


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last dimension, statistics in float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)  # [B, T, D]
        rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)  # [B, T, 1]
        return (wide * rms * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; kernels are stored as [D, H, head_dim]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K, size = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        normal = jax.nn.initializers.normal(config.init_std)
        self.query = nnx.Param(normal(rngs.params(), (D, H, size)), axes=("embed", "heads", "head_dim"))
        self.key = nnx.Param(normal(rngs.params(), (D, K, size)), axes=("embed", "kv_heads", "head_dim"))
        self.value = nnx.Param(normal(rngs.params(), (D, K, size)), axes=("embed", "kv_heads", "head_dim"))
        residual = jax.nn.initializers.normal(config.residual_std)
        self.out = nnx.Param(residual(rngs.params(), (H, size, D)), axes=("heads", "head_dim", "embed"))

    def project_qkv(self, x: jax.Array, rope: RopeCosSin) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] → query [B, T, H, d], key and value [B, T, K, d], the first two rotated."""
        query = _to_heads(x, self.query[...], "heads")
        key = _to_heads(x, self.key[...], "kv_heads")
        value = _to_heads(x, self.value[...], "kv_heads")
        return apply_rope(query, rope), apply_rope(key, rope), value

    def project_out(self, heads: jax.Array) -> jax.Array:
        """[B, T, H, d] → [B, T, D]."""
        out = self.out[...].reshape(-1, self.out.shape[-1])  # [H·d, D]
        return sharded_matmul(heads.reshape(*heads.shape[:2], -1), out, ("heads", "embed"))


def _to_heads(x: jax.Array, kernel: jax.Array, heads: str) -> jax.Array:
    """x [B, T, D], kernel [D, H, d] → [B, T, H, d]."""
    D, H, size = kernel.shape
    return sharded_matmul(x, kernel.reshape(D, H * size), ("embed", heads)).reshape(*x.shape[:2], H, size)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.mlp_size
        normal = jax.nn.initializers.normal(config.init_std)
        self.gate = nnx.Param(normal(rngs.params(), (D, F)), axes=("embed", "mlp"))
        self.up = nnx.Param(normal(rngs.params(), (D, F)), axes=("embed", "mlp"))
        residual = jax.nn.initializers.normal(config.residual_std)
        self.down = nnx.Param(residual(rngs.params(), (F, D)), axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = sharded_matmul(x, self.gate[...], ("embed", "mlp"))  # [B, T, F]
        up = sharded_matmul(x, self.up[...], ("embed", "mlp"))  # [B, T, F]
        return sharded_matmul(jax.nn.silu(gate) * up, self.down[...], ("mlp", "embed"))  # [B, T, D]


class Layer(nnx.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: jax.Array, rope: RopeCosSin, kernel: str, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], segment_ids int32 [B, T] → [B, T, D]."""
        return self.prefill(x, rope, kernel, segment_ids)[0]

    def prefill(
        self, x: jax.Array, rope: RopeCosSin, kernel: str, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """The same, and the keys and values [B, K, T, d] that a cache keeps of it."""
        query, key, value = self.attention.project_qkv(self.attention_norm(x), rope)
        x = x + self.attention.project_out(attention.attend(query, key, value, kernel, segment_ids))
        x = sharding.constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)
        return x, (key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))

    def decode_step(
        self, x: jax.Array, rope: RopeCosSin, position: DecodePosition, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """The same over one new token a row, x [B, 1, D], written into the cache first."""
        query, key, value = self.attention.project_qkv(self.attention_norm(x), rope)  # [B, 1, H or K, d]
        keys, values = (
            _update_cache(old, new, position.slot) for old, new in zip(cache, (key, value), strict=True)
        )
        heads = attention.attend_cache(query[:, 0], keys, values, position.visible)  # [B, H, d]
        x = x + self.attention.project_out(heads[:, None])
        return x + self.mlp(self.mlp_norm(x)), (keys, values)


class DecodePosition(NamedTuple):
    """Where a new token of each row goes.

    Attributes:
      position: int32 [B], its place in its row.
      slot: int32 [], the cache's place that takes it: one for all rows, so that a cache is updated where it lies.
      visible: bool [B, S], the cache's places that a row sees, `slot` among them.
    """

    position: jax.Array
    slot: jax.Array
    visible: jax.Array


RopeCosSin = tuple[jax.Array, jax.Array]  # cosines and sines of the rotary angles, float32 [B, T, 1, d/2]
Cache = tuple[
    jax.Array, jax.Array
]  # keys and values of a layer, each [B, K, S, d], or [K, S, d] for a lone row
CACHE_AXES = ("batch", "kv_heads", None, None)


def _update_cache(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """A cache with new keys or values [B, 1, K, d] in one slot."""
    new = new.reshape(*cache.shape[:-2], 1, cache.shape[-1])  # [(B,) K, 1, d]
    cache = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=cache.ndim - 2)
    return sharding.constrain(cache, *CACHE_AXES[-cache.ndim :])


class Transformer(nnx.Module):
    """Embedding, layers, norm, output projection.

    Args:
      config: its shape.
      rngs: of the first parameters.
      stacked: whether layers are stacked (`__call__`, `hidden`) or one by one (`prefill`, `decode_step`).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stacked: bool = True):
        if config.vocabulary_size < 1:
            raise UserError("vocabulary_size: must be set to build a model")
        V, D = config.vocabulary_size, config.hidden_size
        normal = jax.nn.initializers.normal(config.init_std)
        self.embedding = nnx.Param(normal(rngs.params(), (V, D)), axes=("vocabulary", "embed"))
        one_by_one = range(0 if stacked else config.num_layers)
        self.layers: Any = (
            _stack(config, rngs) if stacked else nnx.List([Layer(config, rngs) for _ in one_by_one])
        )
        self.norm = RMSNorm(D, config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(normal(rngs.params(), (D, V)), axes=("embed", "vocabulary"))
        self.config = config

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, kernel: str, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """tokens, positions, segment_ids int32 [B, T] → logits float32 [B, T, V]."""
        return self.logits(self.hidden(tokens, positions, kernel, segment_ids))

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, kernel: str, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """The same up to what `logits` takes: [B, T, D] in the compute dtype."""
        graphdef, layers = nnx.split(self.layers)
        rope = self._rope(positions)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x, rope, kernel, segment_ids), None

        if self.config.remat not in (
            "none",
            "auto",
        ):  # `auto` is resolved before training; elsewhere it's none
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
        x, _ = jax.lax.scan(body, self._embed(tokens), layers)  # [B, T, D]
        return x

    def prefill(self, tokens: jax.Array, positions: jax.Array, kernel: str) -> tuple[jax.Array, list[Cache]]:
        """Whole rows int32 [B, T] → hidden [B, T, D], and what each layer's cache keeps of them [B, K, T, d]."""
        x, rope, caches = self._embed(tokens), self._rope(positions), []
        for layer in self.layers:
            x, cache = layer.prefill(x, rope, kernel)
            caches.append(cache)
        return x, caches

    def decode_step(
        self, tokens: jax.Array, position: DecodePosition, caches: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """One new token a row, int32 [B] → hidden [B, D], and the caches with its keys and values."""
        x, rope, new_caches = self._embed(tokens[:, None]), self._rope(position.position[:, None]), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.decode_step(x, rope, position, cache)
            new_caches.append(cache)
        return x[:, 0], new_caches

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden [..., D] → logits float32 [..., V]: inputs in the compute dtype, sums in float32."""
        return jnp.matmul(
            self.norm(x), self.output_projection().astype(x.dtype), preferred_element_type=jnp.float32
        )

    def output_projection(self) -> jax.Array:
        """The output projection, float32 [D, V]."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _rope(self, positions: jax.Array) -> RopeCosSin:
        return rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = sharding.constrain(self.embedding[...].astype(self.config.dtype), "vocabulary", None)
        # Looked up in float32, so that the gradients of a token's many places are summed in float32.
        x = table.astype(jnp.float32)[tokens].astype(self.config.dtype)  # [B, T, D]
        return sharding.constrain(x, "batch", "length", None)


def _stack(config: ModelConfig, rngs: nnx.Rngs) -> Layer:
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0)
    def make(layer_rngs: nnx.Rngs) -> Layer:
        return Layer(config, layer_rngs)

    return make(rngs)


def rope_cos_sin(positions: jax.Array, head_dim: int, theta: float) -> RopeCosSin:
    """Cosines and sines of the rotary angles, float32 [B, T, 1, d/2] each.

    Args:
      positions: int32 [B, T].
      head_dim: d, even.
      theta: base of the geometric series of wavelengths.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [d/2]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, d/2]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: RopeCosSin) -> jax.Array:
    """Rotary position embedding by half rotation (the Hugging Face convention), in float32: x [B, T, H, d]."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, H, d/2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
