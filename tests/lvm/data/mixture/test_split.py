"""The split: a group is in one split only, the same everywhere and in every version."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.split import group_hash, heldout_mask

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=2, unique=True).map(lambda x: np.array(x, np.uint64))


def test_group_hash_is_stable():
    assert group_hash("video 7") == 8972934065191738422
    assert group_hash("") == 13020603013274838756


@given(hashes, st.floats(0.001, 0.999), st.data())
def test_heldout_mask_keeps_groups_together(hashes, fraction, data):
    groups = data.draw(st.lists(st.integers(0, len(hashes) - 1), max_size=20))
    groups = np.array([*range(len(hashes)), *groups])
    mask = heldout_mask(hashes[groups], fraction)
    np.testing.assert_array_equal(mask, heldout_mask(hashes, fraction)[groups])
    assert mask.any()
    assert not mask.all()


def test_heldout_mask_approximates_fraction_and_is_nested():
    hashes = np.array([group_hash(f"image {i}") for i in range(4000)], np.uint64)
    tenth, third = heldout_mask(hashes, 0.1), heldout_mask(hashes, 0.3)
    assert abs(tenth.mean() - 0.1) < 0.02
    assert abs(third.mean() - 0.3) < 0.03
    assert not (tenth & ~third).any()


def test_heldout_mask_of_few_groups_takes_lowest_hash():
    high = 2**63
    lowest = heldout_mask(np.array([high + 2, high + 1], np.uint64), 0.01)
    np.testing.assert_array_equal(lowest, [False, True])
    np.testing.assert_array_equal(heldout_mask(np.array([2, 1, 1], np.uint64), 0.5), [False, True, True])


def test_fraction_0_holds_nothing_out():
    assert not heldout_mask(np.array([0, 1], np.uint64), 0.0).any()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fraction_outside_unit_interval_raises(fraction):
    with pytest.raises(UserError, match=rf"^heldout_fraction={fraction}"):
        heldout_mask(np.array([1, 2], np.uint64), fraction)


@pytest.mark.parametrize("count", [1, 3])
def test_single_group_raises(count):
    with pytest.raises(UserError, match=r"^heldout_fraction=0\.5 .*two"):
        heldout_mask(np.full(count, 5, np.uint64), 0.5)


def test_no_scenes_raise():
    with pytest.raises(UserError, match=r"^heldout_fraction=0\.5 .*scenes"):
        heldout_mask(np.zeros(0, np.uint64), 0.5)


def test_extremes_apply_the_rule_of_the_whole_set():
    # With a tiny fraction only the lowest group is held out; a caller without that group must hold out nothing else.
    hashes = np.array([3, 5, 9], np.uint64) << np.uint64(60)
    assert heldout_mask(hashes, 1e-6).tolist() == [True, False, False]
    extremes = (int(hashes.min()), int(hashes.max()))
    assert heldout_mask(hashes[1:], 1e-6, extremes).tolist() == [False, False]
