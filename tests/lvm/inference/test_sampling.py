"""Frequencies of sampled tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lvm.common.errors import UserError
from lvm.inference.sampling import SamplingParams, _truncate, batch_sampling, sample_token

PROBS = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
COUNT = 4000


def sample(*params, probs=PROBS, count=COUNT):
    """Samples ids [params, count] in one batch."""
    sampling = batch_sampling(params, list(range(len(params))), count)
    rows = jnp.tile(jnp.log(jnp.float32(probs)), (len(params) * count, 1))
    return np.asarray(jax.jit(sample_token)(rows, sampling, jnp.int32(0))).reshape(len(params), count)


def check(ids, probs):
    """χ² test at the 0.1 % level; ids of probability 0 must not occur."""
    counts, probs = np.bincount(ids, minlength=len(probs)), np.asarray(probs) / np.sum(probs)
    assert not counts[probs == 0].any()
    possible = probs > 0
    assert stats.chisquare(counts[possible], probs[possible] * len(ids)).pvalue > 0.001


def test_sample_token_follows_each_rows_distribution():
    plain, sharp, top_k, top_p, both, greedy = sample(
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.7),  # reached by 0.5 + 0.25
        SamplingParams(temperature=2.0, top_k=4, top_p=0.8),
        SamplingParams(temperature=0.0),
    )
    check(plain, PROBS)
    check(sharp, PROBS**2)
    check(top_k, [0.5, 0.25, 0, 0, 0])
    check(top_p, [0.5, 0.25, 0, 0, 0])
    flat = PROBS[:4] ** 0.5 / np.sum(PROBS[:4] ** 0.5)  # 0.39, 0.27, 0.21, 0.14: three reach 0.8
    check(both, [*flat[:3], 0, 0])
    assert set(greedy) == {0}


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_top_k_keeps_the_k_most_likely(k, seed):
    probs = np.random.default_rng(seed).permutation(2.0 ** -np.arange(8))
    ids = sample(SamplingParams(temperature=3.0, top_k=k), probs=probs, count=64)[0]
    assert set(ids) <= set(np.argsort(-probs)[:k].tolist())


def test_top_k_above_the_vocabulary_keeps_all():
    all_tokens, more = sample(SamplingParams(), SamplingParams(top_k=99))
    check(all_tokens, PROBS)
    check(more, PROBS)
    assert set(more) == set(all_tokens) == set(np.flatnonzero(PROBS))


def test_values_beyond_the_devices_dtypes_are_limits():
    all_tokens, cold, narrow = sample(
        SamplingParams(top_k=2**40), SamplingParams(temperature=1e-40), SamplingParams(top_p=1e-60), probs=PROBS[::-1]
    )
    check(all_tokens, PROBS[::-1])
    assert set(cold) == set(narrow) == {4}


def test_sample_token_depends_on_seed_and_index():
    sampling = batch_sampling([SamplingParams()] * 2, [5, 5], 3)
    logits = jnp.zeros((6, 1000))
    ids = sample_token(logits, sampling, jnp.int32(4)).reshape(2, 3)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert len(set(ids[0].tolist())) == 3
    assert (sample_token(logits, sampling, jnp.int32(5)).reshape(2, 3) != ids).any()


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_sampling_params_reject_invalid_values(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_seeds_count_modulo_two_to_the_32():
    keys = jax.random.key_data(batch_sampling([SamplingParams()] * 4, [0, 2**31, 2**32, -1], 1).keys).tolist()
    assert keys[0] == keys[2]
    assert len({tuple(key) for key in keys}) == 3


def test_truncate_keeps_unlikely_tokens_without_top_p():
    logits = jnp.array([[0.0, -40.0, -50.0]])  # the first one's probability rounds to 1
    kept = _truncate(logits, jnp.array([2]), jnp.array([1.0]))
    np.testing.assert_array_equal(kept, [[0.0, -40.0, -np.inf]])
