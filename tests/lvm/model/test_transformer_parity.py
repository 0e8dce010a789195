"""Parity with transformers' Llama in torch: same random weights, float32, long rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.model import nnx_utils
from lvm.model.transformer import ModelConfig, Transformer
from lvm.training.losses import token_losses

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Wrong RoPE angles, or angles not in float32, show at late positions.
B, T, V = 1, 1100, 131
D, F, L, H = 64, 176, 3, 4

variants = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
grouped = pytest.mark.parametrize("kv_heads", [4, 2], ids=["all heads", "grouped"])


def our_config(kv_heads, tied):
    return ModelConfig(
        hidden_size=D, mlp_size=F, num_layers=L, num_heads=H, num_kv_heads=kv_heads, vocabulary_size=V, context=T,
        rope_theta=10000.0, norm_epsilon=1e-6, tie_embeddings=tied, dtype="float32", attention="xla",
    )  # fmt: skip


def random_params(config):
    """Parameters large enough for attention to depend on positions; scales away from 1."""
    _, shapes = nnx_utils.abstract_module(lambda rngs: Transformer(config, rngs))
    rng = np.random.default_rng(0)

    def sample(path, leaf):
        if path[-1].key == "scale":
            return (1 + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        return (0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(sample, shapes)


def tokens():
    return np.random.default_rng(1).integers(0, V, (B, T + 1), dtype=np.int32)


def to_hugging_face(params):
    """Our parameters under Llama's names: one [out, in] matrix per layer."""
    named = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if "head" in params:
        named["lm_head.weight"] = params["head"].T
    ours = params["layers"]
    for i in range(L):
        prefix = f"model.layers.{i}"
        named[f"{prefix}.input_layernorm.weight"] = ours["attention_norm"]["scale"][i]
        named[f"{prefix}.post_attention_layernorm.weight"] = ours["mlp_norm"]["scale"][i]
        for name in ("query", "key", "value"):  # [D, H, d]
            kernel = ours["attention"][name][i]
            named[f"{prefix}.self_attn.{name[0]}_proj.weight"] = kernel.reshape(D, -1).T
        named[f"{prefix}.self_attn.o_proj.weight"] = ours["attention"]["out"][i].reshape(-1, D).T  # [H, d, D]
        for name in ("gate", "up", "down"):
            named[f"{prefix}.mlp.{name}_proj.weight"] = ours["mlp"][name][i].T
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def llama(config, params):
    """Transformers' model with our parameters."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=T,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state = {name: torch.from_numpy(value.copy()) for name, value in to_hugging_face(params).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return model


@functools.cache
def both(kv_heads, tied):
    """Logits and gradients of the mean next-token loss: (ours, theirs), gradients under Llama's names."""
    config = our_config(kv_heads, tied)
    params, rows = random_params(config), tokens()
    graphdef, _ = nnx_utils.abstract_module(lambda rngs: Transformer(config, rngs))
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))

    def loss(params):
        model = nnx_utils.merge(graphdef, params)
        hidden = model.hidden(jnp.asarray(rows[:, :-1]), positions, "xla")
        losses, _ = token_losses(model.norm(hidden), model.output_projection(), jnp.asarray(rows[:, 1:]), 512)
        return jnp.mean(losses), model.logits(hidden)

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    ours = np.asarray(logits), to_hugging_face(jax.tree.map(np.asarray, gradients))

    model = llama(config, params)
    inputs, targets = (torch.from_numpy(x.astype(np.int64)) for x in (rows[:, :-1], rows[:, 1:]))
    theirs = model(input_ids=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten()).backward()
    named = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return ours, (theirs.detach().numpy(), named)


@variants
@grouped
def test_logits_agree_at_every_position(kv_heads, tied):
    (ours, _), (theirs, _) = both(kv_heads, tied)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@variants
@grouped
def test_gradients_agree_for_every_parameter(kv_heads, tied):
    (_, ours), (_, theirs) = both(kv_heads, tied)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{name}: {error:.1e}"
