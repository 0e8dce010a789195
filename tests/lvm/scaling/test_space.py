"""Sweep language: laws of its combinators."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.model.transformer import SIZES
from lvm.scaling import space

KEYS = st.sampled_from(["width", "budget", "optimizer.b2"])
SPACES = st.builds(lambda key, values: space.param(key, *values), KEYS, st.lists(st.integers(), max_size=4))


def of_key(key):
    return st.lists(st.integers(), max_size=4).map(lambda values: space.param(key, *values))


@given(of_key("a"), of_key("b"), of_key("c"))
def test_product_has_every_combination_once(a, b, c):
    points = space.product(a, b, c)
    assert len(points) == math.prod(map(len, (a, b, c)))
    expected = [{**x, **y, **z} for x in a for y in b for z in c]
    assert [*points] == expected
    assert space.product(space.product(a, b), c) == space.product(a, space.product(b, c)) == points


@given(SPACES, SPACES, SPACES)
def test_chain_concatenates(a, b, c):
    assert space.chain(a, b, c) == a + b + c
    assert space.chain(a, space.chain(b, c)) == space.chain(space.chain(a, b), c)


@given(st.lists(st.tuples(st.integers(), st.integers())))
def test_zip_merges_points_in_order(pairs):
    a, b = space.param("a", *(x for x, _ in pairs)), space.param("b", *(y for _, y in pairs))
    assert space.zip_spaces(a, b) == tuple({"a": x, "b": y} for x, y in pairs)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 3))
def test_subsample_keeps_order_and_seed(size, count, seed):
    points = space.param("a", *range(size))
    if count > size:
        with pytest.raises(UserError, match=f"count={count} of a space of {size} points"):
            space.subsample(points, count, seed)
        return
    chosen = space.subsample(points, count, seed)
    values = [point["a"] for point in chosen]
    assert len(values) == count
    assert values == sorted(set(values))
    assert chosen == space.subsample(points, count, seed)


@given(of_key("a").filter(len), of_key("b").filter(len))
def test_product_refuses_key_set_twice(a, b):
    with pytest.raises(UserError, match="'a' is set by two spaces"):
        space.product(a, b, a)


def test_zip_refuses_unequal_lengths():
    with pytest.raises(UserError, match="spaces of 2, 3 points"):
        space.zip_spaces(space.param("a", 1, 2), space.param("b", 1, 2, 3))


def test_kinds_are_spaces_of_points():
    shapes = space.listed(SIZES["300m"], SIZES["600m"])
    assert space.isoflop([1e18, 3e18], shapes)[1] == {"budget": 1e18, **shapes[1]}
    assert space.chinchilla_grid(shapes, [10, 20])[1] == {**shapes[0], "tokens_per_param": 20}
    assert space.decay_branches(shapes[:1], [1e9, 2e9])[1] == {**shapes[0], "branch": True, "tokens": 2e9}
    grid = space.learning_rate_grid(shapes[:1], [1e-3, 2e-3], [8, 16, 32])
    assert len(grid) == 6
    assert (grid[1]["batch_size"], grid[1]["learning_rate"]) == (8, 2e-3)
