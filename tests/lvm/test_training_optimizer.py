"""The schedule's corners, what is decayed, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.errors import UserError
from lvm.model import ModelConfig, Transformer
from lvm.module import abstract
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10, clip_norm=0.0)


def test_the_schedule_warms_up_and_ends_where_it_says():
    _, schedule = optimizer.build(CONFIG, 100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, 0.05, 0.1], rtol=1e-5)
    np.testing.assert_allclose(schedule(55), (0.1 + 0.01) / 2, rtol=1e-5)  # half of the cosine
    np.testing.assert_allclose([schedule(100), schedule(1000)], 0.01, rtol=1e-5)


def test_without_warm_up_it_starts_at_the_top():
    _, schedule = optimizer.build(dataclasses.replace(CONFIG, warmup_steps=0), 100)
    np.testing.assert_allclose([schedule(0), schedule(100)], [0.1, 0.01], rtol=1e-5)


@pytest.mark.parametrize("total_steps", [5, 10])
def test_a_warm_up_longer_than_the_run_is_refused(total_steps):
    with pytest.raises(UserError, match=rf"warmup_steps: 10 is not below total_steps {total_steps}"):
        optimizer.build(CONFIG, total_steps)


def changes(config, params, gradients):
    tx, _ = optimizer.build(config, 100)
    return tx.update(gradients, tx.init(params), params)[0]


def test_matrices_are_decayed_and_nothing_else():
    names = ("kernel", "scale", "bias", "embedding", "codebook")
    params = {"layer": {name: jnp.ones((2, 2)) for name in names}}
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.5)
    moved = changes(config, params, jax.tree.map(jnp.zeros_like, params))["layer"]
    np.testing.assert_allclose(moved.pop("kernel"), -0.1 * 0.5, rtol=1e-5)
    assert all(not np.any(moved[name]) for name in names[1:])


def test_of_a_transformer_the_norms_and_the_embedding_are_not_decayed():
    config = ModelConfig(hidden_size=8, mlp_size=8, num_layers=2, num_heads=2, vocabulary_size=8)
    _, params = abstract(lambda rngs: Transformer(config, rngs))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree.leaves_with_path(optimizer._decayed(params))
    }
    spared = {name for name, value in decayed.items() if not value}
    assert spared == {"embedding", "norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"}


@pytest.mark.parametrize(("clip_norm", "scaled"), [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_above_the_norm_are_scaled_down(clip_norm, scaled):
    # With b1 = b2 = 0 and a large epsilon, Adam's step is all but proportional to the gradient.
    config = dataclasses.replace(
        CONFIG, warmup_steps=0, b1=0.0, b2=0.0, epsilon=1e6, weight_decay=0.0, clip_norm=clip_norm
    )
    moved = changes(config, {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([6.0, 8.0])})
    np.testing.assert_allclose(moved["kernel"], -0.1 * scaled * np.array([6, 8]) / 1e6, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("learning_rate", 0.0, "not positive"),
        ("epsilon", -1.0, "not positive"),
        ("end_learning_rate", -0.1, "negative"),
        ("warmup_steps", -1, "negative"),
        ("weight_decay", -0.1, "negative"),
        ("clip_norm", -1.0, "negative"),
        ("b1", 1.0, r"not in \[0, 1\)"),
        ("b2", -0.1, r"not in \[0, 1\)"),
    ],
)
def test_impossible_values_are_refused_by_key(key, value, problem):
    with pytest.raises(UserError, match=rf"^{key}: {value} is {problem}"):
        OptimizerConfig(**{key: value})
