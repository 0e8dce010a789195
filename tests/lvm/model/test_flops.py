"""FLOP counts by hand and against XLA's cost analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lvm.model.flops import forward_flops_per_token, train_flops_per_token
from lvm.model.nnx_utils import abstract_module, count_params, merge
from lvm.model.transformer import SIZES, ModelConfig, Transformer

WITH_VOCABULARY = {name: dataclasses.replace(size, vocabulary_size=8448) for name, size in SIZES.items()}


@pytest.mark.parametrize("size", ["300m", "1b", "3b", "7b"])
def test_short_rows_cost_two_flops_per_weight(size):
    config = WITH_VOCABULARY[size]
    _, params = abstract_module(lambda rngs: Transformer(config, rngs))
    norms = (2 * config.num_layers + 1) * config.hidden_size
    weights = count_params(params) - params["embedding"].size - norms
    assert forward_flops_per_token(config, 1, "causal") == pytest.approx(2 * weights, rel=1e-3)


def test_train_flops_of_1b_by_hand():
    # Layers: 4 projections of 2048² and 3 of 2048 × 5504; the head 2048 × 8448; attention 2 · 2048 · T.
    weights = 22 * (4 * 2048**2 + 3 * 2048 * 5504) + 2048 * 8448
    whole = 22 * 2 * 2048 * 4096
    assert train_flops_per_token(WITH_VOCABULARY["1b"], 4096, "whole") == 6 * (weights + whole)
    assert train_flops_per_token(WITH_VOCABULARY["1b"], 4096, "causal") == 6 * (weights + whole / 2)


def test_forward_flops_agree_with_xla():
    # One layer, because XLA counts a scanned body once; it also counts elementwise operations.
    config = ModelConfig(
        hidden_size=256,
        mlp_size=512,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        vocabulary_size=512,
        dtype="float32",
    )
    graphdef, params = abstract_module(lambda rngs: Transformer(config, rngs))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    run = jax.jit(lambda p, t, positions: merge(graphdef, p)(t, positions, "xla"))
    counted = run.lower(params, tokens, tokens).compile().cost_analysis()["flops"]
    ours = forward_flops_per_token(config, 128, "whole") * 2 * 128
    assert ours < counted < 1.05 * ours


def test_grouped_heads_save_kv_projections():
    config = WITH_VOCABULARY["7b"]
    grouped = dataclasses.replace(config, num_kv_heads=8)
    saved = forward_flops_per_token(config, 4096, "causal") - forward_flops_per_token(grouped, 4096, "causal")
    assert saved == 2 * 32 * 2 * 4096 * (4096 - 1024)


def test_unknown_convention_is_rejected():
    with pytest.raises(ValueError, match="'half' must be one of causal, whole"):
        forward_flops_per_token(WITH_VOCABULARY["1b"], 4096, "half")
