"""The LLaMA-style decoder and its named sizes.

RMSNorm before attention and MLP, half-rotation RoPE, SwiGLU, no biases. For training, layers are stacked and run by
one `jax.lax.scan`; for decoding they are unrolled, each with its own KV cache: a scan would copy the cache at every
token. Parameters are float32, compute is `dtype`; norm statistics, RoPE, softmax and logits are float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.hardware import sharding
from lvm.model import attention
from lvm.model.parametrization import RESIDUAL, ParameterScale, ParametrizationConfig, parameter_scales
from lvm.model.sharded_matmul import sharded_matmul


def _is_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Matches the attention kernels' outputs and the statistics that their backward passes need."""
    # cuDNN's forward pass is one primitive, which names neither.
    named = params.get("name") == attention.CHECKPOINT_NAME
    return named or primitive.name == "dot_product_attention_fwd_wrapper"


_policies = jax.checkpoint_policies
# Activations that are saved for the backward pass, from most memory to least.
REMAT_POLICIES = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _is_attention),
    "attention": _is_attention,
    "full": _policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a LLaMA-style decoder.

    Attributes:
      depth_scaled_init: scales the initial projections back to the residual stream by 1/√(2·num_layers), as in GPT-2;
        with completep, which scales with the depth itself, by that of the base model.
      remat: what the backward pass recomputes: "none" nothing, "dots" all but matrix products and attention,
        "attention" all but attention, "full" everything; "auto" is the first of these that fits in memory
        (`lvm.training.step`).
    """

    hidden_size: int = 1024
    mlp_size: int = 2688
    num_layers: int = 22
    num_heads: int = 8
    num_kv_heads: int = 0  # key-value heads, a divisor of `num_heads`; 0 means `num_heads`
    vocabulary_size: int = 0  # 0 means the vocabulary of the data
    context: int = 4096  # maximum input length in tokens
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02  # standard deviation of the initial weights
    depth_scaled_init: bool = False
    tie_embeddings: bool = False  # the output projection is the transposed embedding
    dtype: str = "bfloat16"  # or "float32": compute type
    attention: str = "auto"  # or a kernel of `lvm.model.attention.KERNELS`
    remat: str = "none"
    parametrization: ParametrizationConfig = dataclasses.field(default_factory=ParametrizationConfig)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "mlp_size", "num_layers", "num_heads", "context")
        check_positive(self, "rope_theta", "norm_epsilon", "init_std")
        check_non_negative(self, "num_kv_heads")
        if self.hidden_size % (2 * self.num_heads):
            size = f"hidden_size={self.hidden_size}"
            raise UserError(f"num_heads={self.num_heads} must divide {size} into an even head dim")
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        check_choice(self, "dtype", ("float32", "bfloat16"))
        check_choice(self, "remat", ("auto", *REMAT_POLICIES))
        check_choice(self, "attention", attention.KERNELS)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def scales(self) -> dict[str, ParameterScale]:
        """The parametrization's scale of each parameter by name, `attention/query` for those of any layer."""
        return parameter_scales(self.parametrization, self.hidden_size, self.num_layers, self.head_dim)

    def initial_std(self, name: str) -> float:
        """Initial standard deviation of a matrix, named as in `scales`."""
        std, scale = self.init_std, self.scales[name]
        if self.depth_scaled_init and name in RESIDUAL:
            std /= (2 * (self.parametrization.base_depth or self.num_layers)) ** 0.5
        return std * scale.init_std * scale.multiplier


# hidden_size, mlp_size, num_layers, num_heads
SIZES = {
    "debug": ModelConfig(128, 256, 2, 4),
    "100m": ModelConfig(640, 1664, 22, 10),
    "300m": ModelConfig(1024, 2688, 22, 8),
    "600m": ModelConfig(1536, 4096, 22, 16),
    "1b": ModelConfig(2048, 5504, 22, 16),
    "3b": ModelConfig(3200, 8640, 26, 32),
    "3b_tpu": ModelConfig(3072, 9216, 26, 24),  # heads of 128, which kernels take unpadded; the paper's have 100
    "7b": ModelConfig(4096, 11008, 32, 32),
}

Tokens = Int[Array, "B T"]  # also positions and segment ids
Hidden = Float[Array, "B T D"]
# Cosines and sines of the RoPE angles, float32 [B, T, 1, d/2] each; [1, T, ...] if all rows have the same positions.
RopeCosSin = tuple[Float[Array, "#B T 1 half"], Float[Array, "#B T 1 half"]]
# Keys and values of a layer, [B, K, S, d] each with S slots; a single row's have no batch dimension.
Cache = tuple[Float[Array, "*B K S d"], Float[Array, "*B K S d"]]
CACHE_AXES = ("batch", "kv_heads", None, None)


class DecodePosition(NamedTuple):
    """Position of the next token of each row."""

    position: Int[Array, " B"]  # RoPE position in the row
    slot: Int[Array, ""]  # of the KV cache that is written: the same in all rows, so that it is updated in place
    visible: Bool[Array, "B S"]  # slots that each row attends to, including `slot`


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last dimension, statistics in float32."""

    def __init__(self, size: int, epsilon: float, initial_scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(size, initial_scale, jnp.float32), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)  # [..., 1]
        return (wide * rms * self.scale[...]).astype(x.dtype)


def _normal(config: ModelConfig, rngs: nnx.Rngs, name: str, *shape: int) -> jax.Array:
    """Initial values of a matrix, named as in `ModelConfig.scales`."""
    return jax.nn.initializers.normal(config.initial_std(name))(rngs.params(), shape)


class Attention(nnx.Module):
    """Causal self-attention with RoPE; kernels are stored as [D, H, d] and [H, d, D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K, size = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        normal = functools.partial(_normal, config, rngs)
        self.query = nnx.Param(normal("attention/query", D, H, size), axes=("embed", "heads", "head_dim"))
        self.key = nnx.Param(normal("attention/key", D, K, size), axes=("embed", "kv_heads", "head_dim"))
        self.value = nnx.Param(normal("attention/value", D, K, size), axes=("embed", "kv_heads", "head_dim"))
        self.out = nnx.Param(normal("attention/out", H, size, D), axes=("heads", "head_dim", "embed"))

    def project_qkv(
        self, x: Hidden, rope: RopeCosSin
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
        """Query, key and value, the first two with RoPE applied."""
        query = _split_heads(x, self.query[...], "heads")
        key = _split_heads(x, self.key[...], "kv_heads")
        value = _split_heads(x, self.value[...], "kv_heads")
        return apply_rope(query, rope), apply_rope(key, rope), value

    def project_out(self, heads: Float[Array, "B T H d"]) -> Hidden:
        out = self.out[...].reshape(-1, self.out.shape[-1])  # [H·d, D]
        return sharded_matmul(heads.reshape(*heads.shape[:2], -1), out, ("heads", "embed"))


def _split_heads(x: Hidden, kernel: Float[Array, "D H d"], axis: str) -> Float[Array, "B T H d"]:
    D, H, size = kernel.shape
    return sharded_matmul(x, kernel.reshape(D, H * size), ("embed", axis)).reshape(*x.shape[:2], H, size)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.mlp_size
        normal = functools.partial(_normal, config, rngs)
        self.gate = nnx.Param(normal("mlp/gate", D, F), axes=("embed", "mlp"))
        self.up = nnx.Param(normal("mlp/up", D, F), axes=("embed", "mlp"))
        self.down = nnx.Param(normal("mlp/down", F, D), axes=("mlp", "embed"))

    def __call__(self, x: Hidden) -> Hidden:
        gate = sharded_matmul(x, self.gate[...], ("embed", "mlp"))  # [B, T, F]
        up = sharded_matmul(x, self.up[...], ("embed", "mlp"))  # [B, T, F]
        return sharded_matmul(jax.nn.silu(gate) * up, self.down[...], ("mlp", "embed"))


class Layer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Hidden, rope: RopeCosSin, kernel: str, segment_ids: Tokens | None = None) -> Hidden:
        return self.prefill(x, rope, kernel, segment_ids)[0]

    def prefill(
        self, x: Hidden, rope: RopeCosSin, kernel: str, segment_ids: Tokens | None = None
    ) -> tuple[Hidden, Cache]:
        """Forward pass over whole rows; returns their keys and values for the cache."""
        query, key, value = self.attention.project_qkv(self.attention_norm(x), rope)
        x = x + self.attention.project_out(attention.attend(query, key, value, kernel, segment_ids))
        x = sharding.constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)
        return x, (key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))

    def decode_step(
        self, x: Float[Array, "B 1 D"], rope: RopeCosSin, position: DecodePosition, cache: Cache
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Forward pass over one new token per row; its key and value are written to the cache first."""
        query, key, value = self.attention.project_qkv(self.attention_norm(x), rope)  # [B, 1, H or K, d]
        keys, values = (_update_cache(old, new, position.slot) for old, new in zip(cache, (key, value), strict=True))
        heads = attention.attend_cache(query[:, 0], keys, values, position.visible)  # [B, H, d]
        x = x + self.attention.project_out(heads[:, None])
        return x + self.mlp(self.mlp_norm(x)), (keys, values)


def _update_cache(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes keys or values [B, 1, K, d] to one slot of a cache."""
    new = new.reshape(*cache.shape[:-2], 1, cache.shape[-1])  # [(B,) K, 1, d]
    cache = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=cache.ndim - 2)
    return sharding.constrain(cache, *CACHE_AXES[-cache.ndim :])


class Transformer(nnx.Module):
    """Embedding, layers, final norm, output projection.

    Layers are stacked for `__call__` and `hidden`, or separate (`stacked=False`) for `prefill` and `decode_step`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stacked: bool = True):
        check_positive(config, "vocabulary_size")
        V, D = config.vocabulary_size, config.hidden_size
        self.embedding = nnx.Param(_normal(config, rngs, "embedding", V, D), axes=("vocabulary", "embed"))
        if stacked:
            make_layers = nnx.vmap(lambda layer_rngs: Layer(config, layer_rngs), in_axes=0)
            self.layers: Any = nnx.split_rngs(splits=config.num_layers)(make_layers)(rngs)
        else:
            self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(D, config.norm_epsilon, config.scales["norm/scale"].multiplier)
        if not config.tie_embeddings:
            self.head = nnx.Param(_normal(config, rngs, "head", D, V), axes=("embed", "vocabulary"))
        self.config = config

    def __call__(
        self, tokens: Tokens, positions: Tokens, kernel: str, segment_ids: Tokens | None = None
    ) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        return self.logits(self.hidden(tokens, positions, kernel, segment_ids))

    def hidden(self, tokens: Tokens, positions: Tokens, kernel: str, segment_ids: Tokens | None = None) -> Hidden:
        """Hidden states in the compute dtype, the input of `logits`."""
        graphdef, layers = nnx.split(self.layers)
        rope = self._rope(positions)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x, rope, kernel, segment_ids), None

        # Training resolves "auto" beforehand; elsewhere it means "none".
        if self.config.remat not in ("none", "auto"):
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
        x, _ = jax.lax.scan(body, self._embed(tokens), layers)  # [B, T, D]
        return x

    def hidden_by_layer(self, tokens: Tokens, positions: Tokens, kernel: str, reduce: Callable[[Hidden], Any]) -> Any:
        """A function of the embeddings and of the hidden states after each layer, stacked along a new first axis.

        The last of the num_layers + 1 entries is that of `hidden`. `reduce` returns a pytree of arrays; whole hidden
        states of one layer alone are in memory at once.
        """
        graphdef, layers = nnx.split(self.layers)
        rope, embeddings = self._rope(positions), self._embed(tokens)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            x = nnx.merge(graphdef, layer)(x, rope, kernel)
            return x, reduce(x)

        _, reduced = jax.lax.scan(body, embeddings, layers)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), reduce(embeddings), reduced)

    def prefill(self, tokens: Tokens, positions: Tokens, kernel: str) -> tuple[Hidden, list[Cache]]:
        """Hidden states of whole rows, and each layer's cache."""
        x, rope, caches = self._embed(tokens), self._rope(positions), []
        for layer in self.layers:
            x, cache = layer.prefill(x, rope, kernel)
            caches.append(cache)
        return x, caches

    def decode_step(
        self, tokens: Int[Array, " B"], position: DecodePosition, caches: list[Cache]
    ) -> tuple[Float[Array, "B D"], list[Cache]]:
        """Hidden states of one new token per row, and the updated caches."""
        x, rope, new_caches = self._embed(tokens[:, None]), self._rope(position.position[:, None]), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.decode_step(x, rope, position, cache)
            new_caches.append(cache)
        return x[:, 0], new_caches

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of hidden states: inputs in the compute dtype, accumulation and output in float32."""
        kernel = self.output_projection().astype(x.dtype)
        return jnp.matmul(self.norm(x), kernel, preferred_element_type=jnp.float32)

    def output_projection(self) -> Float[Array, "D V"]:
        """The float32 output projection."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _rope(self, positions: jax.Array) -> RopeCosSin:
        return rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = sharding.constrain(self.embedding[...].astype(self.config.dtype), "vocabulary", None)
        # Looked up in float32, so that the gradients of a token's many occurrences are summed in float32.
        x = table.astype(jnp.float32)[tokens].astype(self.config.dtype)  # [B, T, D]
        return sharding.constrain(x, "batch", "length", None)


def rope_cos_sin(positions: Tokens, head_dim: int, theta: float) -> RopeCosSin:
    """Cosines and sines of the RoPE angles, for an even head dim; `theta` is the base of the series of wavelengths."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [d/2]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, d/2]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T H d"], rope: RopeCosSin) -> Float[Array, "B T H d"]:
    """Rotary position embedding by half rotation (the Hugging Face convention), computed in float32."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, H, d/2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
