"""Optimizer settings that are refused, by key."""

import dataclasses

import pytest

from lvm.common.errors import UserError
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10, clip_norm=0.0)


@pytest.mark.parametrize("total_steps", [5, 10])
def test_build_refuses_warmup_longer_than_run(total_steps):
    with pytest.raises(UserError, match=f"warmup_steps=10 must be below total_steps={total_steps}"):
        optimizer.build(CONFIG, total_steps)


@pytest.mark.parametrize(
    ("options", "tokens_per_step", "problem"),
    [
        ({"decay_steps": 91}, 0, "decay_steps=91 after warmup_steps=10 exceeds total_steps=100"),
        (
            {"warmup_steps": 0, "warmup_tokens": 1001, "decay_tokens": 8901},
            100,
            r"decay_tokens=8901 \(90 steps\) after warmup_tokens=1001 \(11 steps\) exceeds total_steps=100",
        ),
        (
            {"warmup_steps": 0, "warmup_tokens": 9901, "decay_steps": 1},
            100,
            r"warmup_tokens=9901 \(100 steps\) must be below total_steps=100",
        ),
        (
            {"warmup_steps": 0, "warmup_tokens": 99, "decay_steps": 1},
            0,
            "warmup_tokens=99, but the task has no tokens; use warmup_steps",
        ),
        ({"decay_tokens": 99}, 0, "decay_tokens=99, but the task has no tokens; use decay_steps"),
    ],
)
def test_build_refuses_lengths_that_do_not_fit_run(options, tokens_per_step, problem):
    config = dataclasses.replace(CONFIG, schedule="wsd", **options)
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{problem}$"):
        optimizer.build(config, 100, tokens_per_step)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"warmup_tokens": 5}, "warmup_tokens=5 and warmup_steps=2000; .* to 0"),
        (
            {"schedule": "wsd", "decay_steps": 7, "decay_tokens": 5},
            "decay_tokens=5 and decay_steps=7; .* to 0",
        ),
        ({"schedule": "wsd"}, "decay_steps=0; wsd needs decay_steps or decay_tokens"),
    ],
)
def test_optimizer_config_refuses_both_units(options, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("choice", "key", "value"),
    [
        ({"name": "lion"}, "epsilon", 1e-6),
        ({"name": "adafactor"}, "b1", 0.8),
        ({"name": "adafactor"}, "b2", 0.99),
        ({"name": "adafactor"}, "epsilon", 1e-6),
        ({"name": "adafactor"}, "moment_dtype", "bfloat16"),
        ({"schedule": "cosine"}, "decay_steps", 10),
        ({"schedule": "cosine"}, "decay_tokens", 10),
        ({"schedule": "constant"}, "decay_steps", 10),
        ({"schedule": "constant"}, "decay_tokens", 10),
        ({"schedule": "constant"}, "end_learning_rate", 0.0),
    ],
)
def test_optimizer_config_refuses_unused_option(choice, key, value):
    ((_, chosen),) = choice.items()
    with pytest.raises(UserError, match=f"^{key}={value} has no effect with {chosen}; leave it at "):
        OptimizerConfig(**choice, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("learning_rate", 0.0, "be positive"),
        ("epsilon", -1.0, "be positive"),
        ("end_learning_rate", -0.1, "not be negative"),
        ("warmup_steps", -1, "not be negative"),
        ("warmup_tokens", -1, "not be negative"),
        ("decay_steps", -1, "not be negative"),
        ("decay_tokens", -1, "not be negative"),
        ("weight_decay", -0.1, "not be negative"),
        ("clip_norm", -1.0, "not be negative"),
        ("b1", 1.0, r"be in \[0, 1\)"),
        ("b2", -0.1, r"be in \[0, 1\)"),
        ("name", "sgd", "be one of adamw, lion, adafactor, muon"),
        ("schedule", "linear", "be one of cosine, wsd, constant"),
        ("weight_decay_mask", "some", "be one of matrices, all"),
        ("moment_dtype", "float16", "be one of float32, bfloat16"),
    ],
)
def test_optimizer_config_names_bad_field(key, value, problem):
    with pytest.raises(UserError, match=rf"^{key}={value!r} must {problem}"):
        OptimizerConfig(**{key: value})
