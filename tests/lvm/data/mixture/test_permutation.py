"""Permutations with random access."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.mixture import permutation
from lvm.data.mixture.permutation import permute

seeds = st.integers(-(2**70), 2**70)


@given(n=st.integers(1, 3000), seed=seeds)
def test_permute_is_a_bijection(n, seed):
    assert sorted(permute(np.arange(n), n, seed).tolist()) == list(range(n))


@given(n=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_permute_maps_elements_independently(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9, unique=True))
    together = permute(np.array(indices), n, seed)
    alone = [int(permute(np.array([index]), n, seed)[0]) for index in indices]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert min(alone) >= 0
    assert max(alone) < n


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 1, 2_000_000_000])
def test_permute_of_billions_is_fast_and_spreads(n):
    start = time.process_time()
    result = permute(np.arange(n - 50_000, n), n, seed=3)
    assert time.process_time() - start < 2
    assert len(np.unique(result)) == 50_000
    assert result.min() >= 0
    assert result.max() < n
    assert abs(result.mean() / n - 0.5) < 0.02  # neighbors spread over the whole range


def test_permute_depends_on_seed():
    orders = {permute(np.arange(20), 20, seed).tobytes() for seed in range(200)}
    assert len(orders) == 200


def test_permute_reaches_every_small_order():
    orders = {tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(200)}
    assert len(orders) == 6


def test_permute_is_uniform():
    counts = np.bincount([permute(np.array([0]), 10, seed)[0] for seed in range(2000)], minlength=10)
    assert counts.min() > 140  # 200 each, standard deviation 13
    assert counts.max() < 260


def test_permute_leaves_its_input_unchanged():
    indices = np.arange(9)
    permute(indices, 9, 0)
    np.testing.assert_array_equal(indices, np.arange(9))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), page=st.integers(1, 70), pages=st.integers(1, 9))
def test_permute_pages_is_a_bijection(n, seed, page, pages):
    result = permutation.permute_pages(np.arange(n), n, seed, page, page * pages)
    assert sorted(result.tolist()) == list(range(n))
    some = np.arange(0, n, 7)
    np.testing.assert_array_equal(permutation.permute_pages(some, n, seed, page, page * pages), result[some])


def test_shuffle_blocks_keeps_neighbors_together():
    n = 100_000
    blocks = permutation.shuffle_indices(np.arange(n), n, 3, "blocks")
    window = blocks[: permutation.WINDOW]
    assert len(np.unique(window // permutation.PAGE)) <= 2 * 65  # 64 pages, each over two of the aligned ones
    assert np.abs(np.diff(window)).mean() > n / 10
    uniform = permutation.shuffle_indices(np.arange(n), n, 3, "all")
    assert len(np.unique(uniform[: permutation.WINDOW] // permutation.PAGE)) > 1000
    assert not np.array_equal(blocks, permutation.shuffle_indices(np.arange(n), n, 4, "blocks"))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_permute_each_is_a_bijection_for_every_id(sizes, seed):
    ids = np.repeat(np.arange(len(sizes)), sizes)
    indices = np.concatenate([np.arange(size) for size in sizes])
    result = permutation.permute_each(indices, np.array(sizes)[ids], seed, ids)
    for i, size in enumerate(sizes):
        assert sorted(result[ids == i].tolist()) == list(range(size))
