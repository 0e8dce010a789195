"""muP and CompleteP: initial values by the published table, and the folded forward pass and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvm.common.errors import UserError
from lvm.model.nnx_utils import abstract_module, init_params, merge
from lvm.model.parametrization import ParameterScale, ParametrizationConfig
from lvm.model.transformer import ModelConfig, Transformer, apply_rope, rope_cos_sin
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig

SMALL = ModelConfig(
    hidden_size=16, mlp_size=24, num_layers=1, num_heads=2, vocabulary_size=12, context=8, dtype="float32",
    init_std=0.5,
)  # fmt: skip
M, L = 2.0, 0.5  # width and depth relative to the base model
COMPLETEP = ParametrizationConfig("completep", base_width=8, base_depth=2, base_head_dim=4)
ATTENTION = 4**0.5 / 8  # scores are scaled by √(base head dim) / head dim
ADAMW = OptimizerConfig(
    learning_rate=0.05, schedule="constant", end_learning_rate=3e-5, warmup_steps=0, epsilon=0.01, weight_decay=0.5,
    clip_norm=0.3,
)  # fmt: skip


@functools.cache
def initialize(config):
    make = lambda rngs: Transformer(config, rngs)  # noqa: E731
    return abstract_module(make)[0], jax.jit(lambda: init_params(make, jax.random.key(0, impl="rbg")))()


def flatten(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("layers/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("parametrization", "scaled", "m", "depth", "heads"),
    [
        (ParametrizationConfig("mup", 16), True, 4, 1, 1),
        (ParametrizationConfig("mup", 16, base_head_dim=4), False, 4, 1, 0.5),
        (ParametrizationConfig("completep", 16, 2), False, 4, 3, 1),
        (ParametrizationConfig("completep", 16, 2), True, 4, 3, 1),
    ],
)
def test_initial_values_follow_published_table(parametrization, scaled, m, depth, heads):
    config = dataclasses.replace(
        SMALL, hidden_size=64, mlp_size=96, num_layers=6, num_heads=4, vocabulary_size=200,
        parametrization=parametrization, depth_scaled_init=scaled,
    )  # fmt: skip
    params = flatten(initialize(config)[1])
    hidden = 0.5 / m**0.5
    num_layers = 2 if parametrization.name == "completep" else 6
    residual = hidden / depth / ((2 * num_layers) ** 0.5 if scaled else 1)
    expected = {
        "embedding": 0.5, "head": 0.5, "attention/query": hidden * heads, "attention/key": hidden,
        "attention/value": hidden, "mlp/gate": hidden, "mlp/up": hidden, "attention/out": residual,
        "mlp/down": residual,
    }  # fmt: skip
    for name, std in expected.items():
        assert float(params[name].std()) == pytest.approx(std, rel=0.04), name
    assert (params["norm/scale"] == 1 / m).all()
    assert (params["attention_norm/scale"] == 1).all()
    assert (params["mlp_norm/scale"] == 1).all()


MULTIPLIERS = {"attention/query": (4 / 8) ** 0.5, "attention/out": 1 / L, "mlp/down": 1 / L, "norm/scale": 1 / M}
HIDDEN = {f"attention/{name}" for name in ("query", "key", "value", "out")} | {"mlp/gate", "mlp/up", "mlp/down"}


def unfold(params, power=-1):
    """Published parameters of ours, whose multipliers are in `published_logits`; with power 1 the inverse."""

    def multiply(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("layers/")
        return leaf * MULTIPLIERS.get(name, 1.0) ** power

    return jax.tree.map_with_path(multiply, params)


def published_logits(params, tokens):
    """The forward pass as published, with the multipliers as constants."""

    def normalize(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    rope = rope_cos_sin(jnp.arange(tokens.shape[1])[None], 8, 10000.0)
    mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    x = params["embedding"][tokens]
    for i in range(1):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        inputs = normalize(x, layer["attention_norm"]["scale"])
        names = ("query", "key", "value")
        query, key, value = (jnp.einsum("btd,dhk->bthk", inputs, layer["attention"][name]) for name in names)
        scores = jnp.einsum("bqhk,bshk->bhqs", apply_rope(query, rope), apply_rope(key, rope)) * ATTENTION
        heads = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), value)
        x = x + jnp.einsum("bthk,hkd->btd", heads, layer["attention"]["out"]) / L
        inputs = normalize(x, layer["mlp_norm"]["scale"])
        gated = jax.nn.silu(inputs @ layer["mlp"]["gate"]) * (inputs @ layer["mlp"]["up"])
        x = x + gated @ layer["mlp"]["down"] / L
    return normalize(x, params["norm"]["scale"]) @ params["head"] / M


def published_optimizer():
    """AdamW with a group for each row of the published table."""

    def adamw(learning_rate, decay, epsilon):
        return optax.adamw(
            0.05 * learning_rate, 0.9, 0.95, eps=0.01 * epsilon, weight_decay=0.5 * decay,
            mask=lambda params: jax.tree.map(lambda leaf: decay > 0, params),
        )  # fmt: skip

    def label(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("layers/")
        if name in HIDDEN:
            return "hidden"
        return {"attention_norm/scale": "norms", "mlp_norm/scale": "norms", "head": "head"}.get(name, "ends")

    groups = {
        "hidden": adamw(1 / M, M, 1 / (M * L)),
        "norms": adamw(1, 0, 1 / (M * L)),
        "ends": adamw(1, 0, 1 / M),  # embedding and final norm, which aren't decayed
        "head": adamw(1, 1, 1 / M),
    }
    labels = lambda params: jax.tree.map_with_path(label, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(0.3), optax.partition(groups, labels))


def train(tx, params, logits, steps=4):
    """Returns the logits before and after a few steps, and the parameters."""
    logits = jax.jit(logits)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 9)))

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens[:, :-1]), tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), logits(params, tokens[:, :-1])
    for _ in range(steps):
        params, state = step(params, state)
    return before, logits(params, tokens[:, :-1]), params


def model_logits(graphdef):
    return lambda params, tokens: merge(graphdef, params)(
        tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), "xla"
    )


def test_folded_training_equals_published_one():
    config = dataclasses.replace(SMALL, parametrization=COMPLETEP)
    graphdef, params = initialize(config)
    before, after, trained = train(optimizer.build(ADAMW, 100, model=config)[0], params, model_logits(graphdef))
    published_before, published_after, expected = train(published_optimizer(), unfold(params), published_logits)
    np.testing.assert_allclose(before, published_before, atol=1e-5)
    np.testing.assert_allclose(after, published_after, atol=1e-4)
    changes, expected = flatten(trained), flatten(unfold(expected, 1))
    for name, initial in flatten(params).items():
        largest = float(jnp.abs(changes[name] - initial).max())
        assert largest > 1e-3, name
        np.testing.assert_allclose(changes[name], expected[name], atol=1e-3 * largest, err_msg=name)


def test_base_model_is_that_of_standard_parametrization():
    mup, completep = ParametrizationConfig("mup", 16), ParametrizationConfig("completep", 16, 1, 8)
    for parametrization in (mup, completep):
        scales = dataclasses.replace(SMALL, parametrization=parametrization).scales.values()
        assert set(scales) == {ParameterScale()}
    config = dataclasses.replace(SMALL, parametrization=completep)
    (graphdef, params), (standard_graph, standard) = initialize(config), initialize(SMALL)
    jax.tree.map(np.testing.assert_array_equal, params, standard)
    *_, trained = train(optimizer.build(ADAMW, 100, model=config)[0], params, model_logits(graphdef))
    *_, expected = train(optimizer.build(ADAMW, 100, model=SMALL)[0], standard, model_logits(standard_graph))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), trained, expected)


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_parametrization_refuses_other_optimizers(name):
    config = dataclasses.replace(SMALL, parametrization=COMPLETEP)
    with pytest.raises(UserError, match=f"config.optimizer.name={name}, .*parametrization.name=completep"):
        optimizer.build(OptimizerConfig(name), 10000, model=config)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "mup"}, "base_width=0; mup needs"),
        ({"name": "completep", "base_width": 8}, "base_depth=0; completep needs"),
        ({"name": "mup", "base_width": 8, "base_depth": 2}, "base_depth=2 has no effect with name=mup"),
        ({"base_width": 8}, "base_width=8 has no effect with name=standard"),
        ({"base_head_dim": 8}, "base_head_dim=8 has no effect with name=standard"),
        ({"name": "ntk"}, "name='ntk' must be one of standard, mup, completep"),
        ({"name": "mup", "base_width": -8}, "base_width=-8 must not be negative"),
    ],
)
def test_parametrization_config_names_bad_field(fields, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        ParametrizationConfig(**fields)
