"""What an optimizer's configuration refuses, by key."""

import dataclasses

import pytest

from lvm.common.errors import UserError
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10, clip_norm=0.0)


@pytest.mark.parametrize("total_steps", [5, 10])
def test_a_warm_up_longer_than_the_run_is_refused(total_steps):
    with pytest.raises(UserError, match=rf"warmup_steps: 10 is not below total_steps {total_steps}"):
        optimizer.build(CONFIG, total_steps)


@pytest.mark.parametrize(
    ("options", "tokens_per_step", "problem"),
    [
        ({"decay_steps": 91}, 0, "decay_steps: 91 after warmup_steps: 10 is longer than total_steps 100"),
        (
            {"warmup_steps": 0, "warmup_tokens": 1001, "decay_tokens": 8901},
            100,
            r"decay_tokens: 8901 \(90 steps\) after warmup_tokens: 1001 \(11 steps\) is longer than total_steps 100",
        ),
        (
            {"warmup_steps": 0, "warmup_tokens": 9901, "decay_steps": 1},
            100,
            r"warmup_tokens: 9901 \(100 steps\) is not below total_steps 100",
        ),
        (
            {"warmup_steps": 0, "warmup_tokens": 99, "decay_steps": 1},
            0,
            "warmup_tokens: 99, but this training counts no tokens; use warmup_steps",
        ),
        ({"decay_tokens": 99}, 0, "decay_tokens: 99, but this training counts no tokens; use decay_steps"),
    ],
)
def test_lengths_that_do_not_fit_the_run_are_refused(options, tokens_per_step, problem):
    config = dataclasses.replace(CONFIG, schedule="wsd", **options)
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{problem}$"):
        optimizer.build(config, 100, tokens_per_step)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"warmup_tokens": 5}, "warmup_tokens: 5 beside warmup_steps 2000; .* to 0"),
        (
            {"schedule": "wsd", "decay_steps": 7, "decay_tokens": 5},
            "decay_tokens: 5 beside decay_steps 7; .* to 0",
        ),
        ({"schedule": "wsd"}, "decay_steps: 0; wsd needs decay_steps or decay_tokens"),
    ],
)
def test_a_length_is_given_once(options, problem):
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
def test_an_option_that_nothing_uses_is_refused(choice, key, value):
    ((_, chosen),) = choice.items()
    with pytest.raises(UserError, match=f"^{key}: {value}, but {chosen} has no use for it; leave it at "):
        OptimizerConfig(**choice, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("learning_rate", 0.0, "not positive"),
        ("epsilon", -1.0, "not positive"),
        ("end_learning_rate", -0.1, "negative"),
        ("warmup_steps", -1, "negative"),
        ("warmup_tokens", -1, "negative"),
        ("decay_steps", -1, "negative"),
        ("decay_tokens", -1, "negative"),
        ("weight_decay", -0.1, "negative"),
        ("clip_norm", -1.0, "negative"),
        ("b1", 1.0, r"not in \[0, 1\)"),
        ("b2", -0.1, r"not in \[0, 1\)"),
        ("name", "sgd", "not one of adamw, lion, adafactor, muon"),
        ("schedule", "linear", "not one of cosine, wsd, constant"),
        ("weight_decay_mask", "some", "not one of matrices, all"),
        ("moment_dtype", "float16", "not one of float32, bfloat16"),
    ],
)
def test_impossible_values_are_refused_by_key(key, value, problem):
    with pytest.raises(UserError, match=rf"^{key}: {value!r} is {problem}"):
        OptimizerConfig(**{key: value})
