import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lvm.common.errors import UserError
from lvm.inference.sampling import SamplingParams, batch_sampling, sample_token

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SHARES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
COUNT = 4000


def drawn(*samplings, shares=SHARES, count=COUNT):
    """Ids [samplings, count]: one batch whose rows draw by their own rules."""
    rules = batch_sampling(samplings, list(range(len(samplings))), count)
    rows = jnp.tile(jnp.log(jnp.float32(shares)), (len(samplings) * count, 1))
    return np.asarray(jax.jit(sample_token)(rows, rules, jnp.int32(0))).reshape(len(samplings), count)


def check(ids, shares):
    """χ² at the 0.1 % level; what has no share is never drawn."""
    counts, shares = np.bincount(ids, minlength=len(shares)), np.asarray(shares) / np.sum(shares)
    assert not counts[shares == 0].any()
    kept = shares > 0
    assert stats.chisquare(counts[kept], shares[kept] * len(ids)).pvalue > 0.001


def test_frequencies_follow_the_softmax_for_each_row_by_its_own_rule():
    plain, sharp, top_k, top_p, both, greedy = drawn(
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.7),  # 0.5 + 0.25 reach it: the third would lie wholly beyond
        SamplingParams(temperature=2.0, top_k=4, top_p=0.8),
        SamplingParams(temperature=0.0),
    )
    check(plain, SHARES)
    check(sharp, SHARES**2)
    check(top_k, [0.5, 0.25, 0, 0, 0])
    check(top_p, [0.5, 0.25, 0, 0, 0])
    flat = SHARES[:4] ** 0.5 / np.sum(SHARES[:4] ** 0.5)  # 0.39, 0.27, 0.21, 0.14: three reach 0.8
    check(both, [*flat[:3], 0, 0])
    assert set(greedy) == {0}


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_top_k_keeps_the_k_likeliest(k, seed):
    shares = np.random.default_rng(seed).permutation(2.0 ** -np.arange(8))
    ids = drawn(SamplingParams(temperature=3.0, top_k=k), shares=shares, count=64)[0]
    assert set(ids) <= set(np.argsort(-shares)[:k].tolist())


def test_more_than_the_vocabulary_is_all_of_it():
    all_tokens, more = drawn(SamplingParams(), SamplingParams(top_k=99))
    check(all_tokens, SHARES)
    check(more, SHARES)


def test_a_seed_is_its_rows_alone():
    rules = batch_sampling([SamplingParams()] * 2, [5, 5], 3)
    logits = jnp.zeros((6, 1000))
    ids = sample_token(logits, rules, jnp.int32(4)).reshape(2, 3)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert len(set(ids[0].tolist())) == 3
    assert (sample_token(logits, rules, jnp.int32(5)).reshape(2, 3) != ids).any()


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_impossible_sampling_is_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)
