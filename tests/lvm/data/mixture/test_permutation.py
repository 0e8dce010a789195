"""Permutations by random access."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.mixture.permutation import permute

seeds = st.integers(-(2**70), 2**70)


@given(n=st.integers(1, 3000), seed=seeds)
def test_it_is_a_bijection(n, seed):
    assert sorted(permute(np.arange(n), n, seed).tolist()) == list(range(n))


@given(n=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_an_element_goes_where_it_goes_alone_or_among_others(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9, unique=True))
    together = permute(np.array(indices), n, seed)
    alone = [int(permute(np.array([index]), n, seed)[0]) for index in indices]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert min(alone) >= 0
    assert max(alone) < n


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 1, 2_000_000_000])
def test_billions_take_no_memory_and_no_time(n):
    start = time.perf_counter()
    places = permute(np.arange(n - 50_000, n), n, seed=3)
    assert time.perf_counter() - start < 2
    assert len(np.unique(places)) == 50_000
    assert places.min() >= 0
    assert places.max() < n
    assert abs(places.mean() / n - 0.5) < 0.02  # neighbours spread over the whole range


def test_other_seeds_are_other_permutations():
    orders = {permute(np.arange(20), 20, seed).tobytes() for seed in range(200)}
    assert len(orders) == 200


def test_small_permutations_reach_every_order():
    orders = {tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(200)}
    assert len(orders) == 6


def test_every_place_is_about_as_likely():
    counts = np.bincount([permute(np.array([0]), 10, seed)[0] for seed in range(2000)], minlength=10)
    assert counts.min() > 140  # 200 each, standard deviation 13
    assert counts.max() < 260


def test_the_input_is_left_as_it_was():
    indices = np.arange(9)
    permute(indices, 9, 0)
    np.testing.assert_array_equal(indices, np.arange(9))
