"""Exported models against a Llama in float64 that knows nothing but transformers' names and config.json."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lvm.inference.generator import SamplingParams
from lvm.inference.pretrained import LVM
from lvm.interop import models
from lvm.model.transformer import RMSNorm, apply_rope, rope_cos_sin
from tests.lvm.small_models import small_model

LENGTH, NEW = 140, 4  # more than one block of queries
# Far from the defaults, so that an ignored setting shows.
SETTINGS = {"rope_theta": 300.0, "norm_epsilon": 0.05, "hidden_size": 32, "num_heads": 4, "context": 160}


def llama(folder, tokens):
    """Logits float64 [T, V] of the model in a folder."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: x.astype(np.float64) for name, x in load_file(folder / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, T = config["hidden_size"] // heads, len(tokens)
    angles = np.arange(T)[:, None] * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    cos, sin = np.tile(np.cos(angles), 2)[:, None], np.tile(np.sin(angles), 2)[:, None]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def rotate(x):
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer, h = f"model.layers.{i}", norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj").reshape(T, -1, size) for name in "qkv")
        k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (rotate(k), v))
        scores = np.einsum("thd,shd->hts", rotate(q), k) / np.sqrt(size)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("hts,shd->thd", probs / probs.sum(axis=-1, keepdims=True), v)
        x = x + linear(out.reshape(T, -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm") @ weights[head].T


@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [
        ({"num_kv_heads": 2}, "float32", 1e-4),
        ({"tie_embeddings": True}, "float32", 1e-4),
        ({"num_kv_heads": 2, "spread": 0.15}, "bfloat16", 0.03),
    ],
    ids=["grouped", "tied", "bfloat16"],
)
def test_exported_model_equals_llama_in_float64(tmp_path, changes, dtype, tolerance):
    models.write(tmp_path / "hf", small_model(**{**SETTINGS, "spread": 0.3, **changes}), "hf")
    model, tokens = LVM.load(tmp_path / "hf", dtype=dtype), np.random.default_rng(0).integers(0, 16, LENGTH)
    expected = llama(tmp_path / "hf", tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(model.logits(tokens[None])[0], expected, rtol=0, atol=tolerance)
    # Each generated token is the most likely one, but for what rounding decides.
    answer = model.generate_tokens(tokens[None], NEW, SamplingParams(temperature=0))[0]
    scores = llama(tmp_path / "hf", np.concatenate([tokens, answer]))[LENGTH - 1 : -1]
    np.testing.assert_allclose(scores[np.arange(NEW), answer], scores.max(axis=1), rtol=0, atol=2 * tolerance)


def test_norm_statistics_are_float32_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (8, 512)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 0.5)
    norm = RMSNorm(512, 0.5)(x)
    assert norm.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(norm, np.float64), expected, rtol=2**-8)  # one rounding


def test_rope_is_float32_in_bfloat16():
    positions = np.array([[0, 1, 1000, 4095]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 16)), jnp.bfloat16)
    angles = positions[0, :, None, None] * 700.0 ** (-np.arange(8) / 8)
    rotated = (np.asarray(x[0, ..., :8], np.float64) + 1j * np.asarray(x[0, ..., 8:], np.float64)) * np.exp(1j * angles)
    actual = np.asarray(apply_rope(x, rope_cos_sin(jnp.asarray(positions), 16, 700.0))[0], np.float64)
    np.testing.assert_allclose(actual, np.concatenate([rotated.real, rotated.imag], axis=-1), rtol=2**-8, atol=1e-3)
