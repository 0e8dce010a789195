"""Rules of hyperparameters and shapes: published values, snapping and ranges."""

import dataclasses
import math
import re

import pytest

from lvm.common.errors import UserError
from lvm.model.transformer import SIZES
from lvm.scaling.rules import RULES, Case, RuleConfig
from lvm.scaling.shapes import ShapeConfig, make_shape

CASE = Case(
    width=1024, params=10**9, tokens=1e11, context=4096, rows_unit=8, batch_size=0, learning_rate=0.0,
    base_batch_size=128, base_learning_rate=3e-4,
)  # fmt: skip


def choose(name, config=None, **changes):
    return RULES[name](dataclasses.replace(CASE, **changes), config or RuleConfig(name))


def test_fixed_rule_keeps_config_unless_point_sets():
    assert (choose("fixed").batch_size, choose("fixed").learning_rate) == (128, 3e-4)
    chosen = choose("fixed", batch_size=16, learning_rate=1e-3)
    assert (chosen.batch_size, chosen.learning_rate) == (16, 1e-3)


def test_step_law_has_published_values():
    chosen = choose("step_law")
    # 1.797·(1e9)^−0.7129·(1e11)^0.3075 and 0.5807·(1e11)^0.5709, by hand.
    assert math.isclose(chosen.learning_rate, 0.00166321, rel_tol=1e-5)
    assert abs(chosen.batch_size - 1108_000 / 4096) < 8
    assert chosen.batch_size % 8 == 0
    assert not chosen.warnings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": 10**7}, "1e[+]07 parameters"),
        ({"tokens": 1e9}, "1e[+]09 tokens"),
        ({"rows_unit": 4096}, "4096 rows"),
    ],
)
def test_step_law_warns_outside_its_range(changes, words):
    assert any(re.search(words, warning) for warning in choose("step_law", **changes).warnings)


def test_square_root_batch_halves_batch_to_its_limit():
    chosen = choose("square_root_batch", RuleConfig("square_root_batch", target_steps=2**14))
    assert chosen.batch_size == 512  # 2048 rows would have 0.0146
    assert chosen.learning_rate == 0.33 * math.sqrt(512) / 1024 <= 0.01
    assert chosen.b2 == 0.98**4


def test_square_root_batch_refuses_higher_learning_rate():
    with pytest.raises(UserError, match=r"learning_rate=0.0146 with 2048 rows and width 1024 is above 0.01"):
        choose("square_root_batch", batch_size=2048)
    with pytest.raises(UserError, match="batch_size=4 must be at least 8"):
        choose("square_root_batch", batch_size=4)


@pytest.mark.parametrize("width", [128, 700, 1024, 4000])
def test_shape_is_snapped_to_multiples(width):
    config = ShapeConfig()
    model = make_shape(SIZES["debug"], config, width)
    assert model.hidden_size % 128 == model.mlp_size % 128 == 0
    assert abs(model.hidden_size - width) <= 64
    assert model.head_dim == 128
    size = model.hidden_size
    assert model.num_layers == max(1, round(size / (55 + 4 * math.log2(size))))
    assert model.mlp_size >= 8 / 3 * size


def test_listed_shape_is_kept():
    size = SIZES["3b"]
    shape = size.hidden_size, size.num_layers, size.num_heads, size.mlp_size
    assert make_shape(SIZES["3b"], ShapeConfig(), *shape) == size


def test_aspect_rule_divides_width():
    assert make_shape(SIZES["debug"], ShapeConfig("aspect", 32, head_dim=8, multiple=8), 90).num_layers == 3
