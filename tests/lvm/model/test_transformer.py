"""The decoder: published sizes, causality, remat, grouped heads, RoPE, and config checks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.model.nnx_utils import abstract_module, count_params, init_params, merge, split
from lvm.model.transformer import SIZES, ModelConfig, Transformer, apply_rope, rope_cos_sin

PUBLISHED = {  # parameters with a vocabulary of 8292
    "100m": 116_974_720,
    "300m": 290_968_576,
    "600m": 648_396_288,
    "1b": 1_147_119_616,
    "3b": 3_274_742_400,
    "3b_tpu": 3_240_877_056,  # ours
    "7b": 6_544_199_680,
}
TINY = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=3, num_heads=4, vocabulary_size=50, context=64, dtype="float32"
)


@functools.cache
def build(config):
    """The graph definition, and random parameters without compiling how they are initialized."""
    graphdef, shapes = abstract_module(lambda rngs: Transformer(config, rngs))
    rng = np.random.default_rng(0)
    sample = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return graphdef, jax.tree.map_with_path(lambda path, leaf: sample(leaf) + (path[-1].key == "scale"), shapes)


def positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_published_parameter_counts(size):
    config = dataclasses.replace(SIZES[size], vocabulary_size=8292)
    _, params = abstract_module(lambda rngs: Transformer(config, rngs))
    assert count_params(params) == PUBLISHED[size]


def test_later_tokens_change_no_earlier_logit():
    graphdef, params = build(TINY)
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 50)
    changed = tokens.at[:, 12].set((tokens[:, 12] + 1) % 50)
    forward = jax.jit(lambda t: merge(graphdef, params)(t, positions(t), "xla"))
    before, after = forward(tokens), forward(changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert jnp.abs(before[:, 12:] - after[:, 12:]).max() > 1e-4


@functools.cache
def gradients(remat):
    graphdef, params = build(dataclasses.replace(TINY, remat=remat))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
    return jax.jit(jax.grad(lambda p: jnp.sum(merge(graphdef, p)(tokens, positions(tokens), "xla") ** 2)))(params)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_remat_keeps_gradients(remat):
    for a, b in zip(jax.tree.leaves(gradients("none")), jax.tree.leaves(gradients(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_tied_embeddings_have_no_head():
    _, untied = abstract_module(lambda rngs: Transformer(TINY, rngs))
    tied_config = dataclasses.replace(TINY, tie_embeddings=True)
    graphdef, tied = build(tied_config)
    assert "head" not in tied
    assert count_params(untied) - count_params(tied) == 50 * 32
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert merge(graphdef, tied)(tokens, positions(tokens), "xla").shape == (1, 4, 50)


def test_grouped_heads_equal_repeated_kv_heads():
    grouped_graph, grouped = build(dataclasses.replace(TINY, num_kv_heads=2))
    full_graph, full = build(TINY)
    full = {**grouped, "layers": {**grouped["layers"], "attention": dict(grouped["layers"]["attention"])}}
    for name in ("key", "value"):
        full["layers"]["attention"][name] = jnp.repeat(grouped["layers"]["attention"][name], 2, axis=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
    a, b = (merge(g, p)(tokens, positions(tokens), "xla") for g, p in ((grouped_graph, grouped), (full_graph, full)))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rope_depends_on_relative_position():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i, j):
        rotate = lambda x, p: apply_rope(x, rope_cos_sin(jnp.array([[p]]), 16, 10000.0))[0, 0, 0]  # noqa: E731
        return rotate(q, i) @ rotate(k, j)

    assert float(score(7, 3)) == pytest.approx(float(score(3007, 3003)), abs=1e-3)
    assert abs(score(7, 3) - score(9, 3)) > 1e-3


def test_rope_rotates_first_half_into_second():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    rotated = apply_rope(x, rope_cos_sin(jnp.array([[1]]), 4, 10000.0))[0, 0, 0]
    np.testing.assert_allclose(rotated, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_bfloat16_compute_is_close_to_float32():
    graphdef, params = build(TINY)
    half_graph, _ = build(dataclasses.replace(TINY, dtype="bfloat16"))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
    exact, half = (merge(g, params)(tokens, positions(tokens), "xla") for g in (graphdef, half_graph))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(exact, half, atol=0.02)


def test_split_inverts_merge():
    graphdef, params = build(TINY)
    again_graph, again = split(merge(graphdef, params))
    assert jax.tree.structure(params) == jax.tree.structure(again)
    assert graphdef == again_graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
        ({"remat": "some"}, "remat='some' must be one of auto, none, dots, attention, full"),
        ({"attention": "magic"}, "attention='magic' must be one of"),
        ({"num_layers": 0}, "num_layers=0 must be positive"),
    ],
)
def test_config_names_impossible_values(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("scaled", [False, True])
def test_initial_weights_have_their_standard_deviations(scaled):
    config = dataclasses.replace(
        TINY, hidden_size=64, mlp_size=96, num_layers=2, init_std=0.5, depth_scaled_init=scaled
    )
    params = jax.jit(lambda: init_params(lambda rngs: Transformer(config, rngs), jax.random.key(0)))()
    layers, residual = params["layers"], 0.5 / 2 if scaled else 0.5  # √(2 · 2) = 2
    for name, expected in {"query": 0.5, "key": 0.5, "value": 0.5, "out": residual}.items():
        assert float(layers["attention"][name].std()) == pytest.approx(expected, rel=0.05)
    for name, expected in {"gate": 0.5, "up": 0.5, "down": residual}.items():
        assert float(layers["mlp"][name].std()) == pytest.approx(expected, rel=0.05)
    for matrix in (params["embedding"], params["head"]):
        assert float(matrix.std()) == pytest.approx(0.5, rel=0.05)
    assert all((scale == 1).all() for scale in (layers["mlp_norm"]["scale"], params["norm"]["scale"]))
    assert (layers["mlp"]["up"][0] != layers["mlp"]["up"][1]).any()  # layers differ
