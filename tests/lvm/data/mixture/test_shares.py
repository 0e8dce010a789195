"""Counts of sentences by component: exact sums, monotone, near their shares, for any weights."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.data.mixture.mixture import BLOCK
from lvm.data.mixture.shares import SCALE, Shares


def random_weights(num_components: int, seed: int, kind: str) -> list[float]:
    """Weights from 1e-6 to 1: log-uniform, uniform, geometric, or one heavy component among light ones."""
    rng = np.random.default_rng(seed)
    match kind:
        case "log":
            return np.exp(rng.uniform(np.log(1e-6), 0, num_components)).tolist()
        case "uniform":
            return rng.uniform(1e-6, 1, num_components).tolist()
        case "geometric":
            return np.maximum(0.5 ** np.arange(num_components), 1e-6).tolist()
    return [1.0] + [1e-6] * (num_components - 1)


def counts(shares: Shares, blocks: np.ndarray) -> np.ndarray:
    """Sentences of each component before each block: int64 [blocks, components]."""
    return np.stack(shares.counts(blocks.astype(np.uint64) * BLOCK), axis=1).astype(np.int64)


@settings(max_examples=30, deadline=None)
@given(
    num_components=st.integers(2, 1000),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["log", "uniform", "geometric", "heavy"]),
    first=st.integers(0, 2**25),
)
def test_counts_are_exact_monotone_and_near_their_shares(num_components, seed, kind, first):
    shares = Shares([Fraction(weight) for weight in random_weights(num_components, seed, kind)])
    assert sum(shares.weights) == SCALE
    before = counts(shares, np.arange(first, first + 300))
    assert (before.sum(1) == np.arange(first, first + 300) * BLOCK).all()
    assert (np.diff(before, axis=0) >= 0).all()
    exact = np.arange(first, first + 300)[:, None] * (BLOCK * np.array(shares.weights) / SCALE)
    assert np.abs(before - exact).max() < 2


@pytest.mark.parametrize("num_components", [2, 33, 200])
def test_counts_stay_monotone_for_100000_blocks(num_components):
    shares = Shares([Fraction(weight) for weight in random_weights(num_components, 0, "log")])
    last = np.zeros(num_components, np.int64)
    for first in range(0, 100_000, 10_000):
        before = counts(shares, np.arange(first, first + 10_000))
        assert (np.diff(before, axis=0) >= 0).all()
        assert (before[0] >= last).all()
        last = before[-1]


def test_counts_repeat_after_scale():
    shares = Shares([Fraction(weight) for weight in (1, 2, 3, 1e-6)])
    assert shares.counts(SCALE) == shares.weights
    for n in (0, 1, 12_345, SCALE - 1):
        shifted = [count - weight for count, weight in zip(shares.counts(n + SCALE), shares.weights, strict=True)]
        assert shares.counts(n) == shifted
        assert [int(count[0]) for count in shares.counts(np.array([n], np.uint64))] == shares.counts(n)


def test_single_component_gets_every_sentence():
    assert Shares([Fraction(1)]).counts(SCALE + 5) == [SCALE + 5]


def test_counts_are_pinned():
    """The order of data follows from them: other counts need another `ORDER`."""
    shares = Shares([Fraction(weight) for weight in ("0.885", "0.072", "0.042", "0.0006", "0.0004")])
    tied = Shares([Fraction(weight) for weight in (1, 1, 1, 2)])
    assert tied.counts(1001) == [201, 200, 200, 400]
    assert shares.counts(1000) == [885, 72, 42, 1, 0]
    assert shares.counts(123_456_789) == [109259258, 8888889, 5185185, 74074, 49383]
