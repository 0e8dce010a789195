"""A group lies on one side of the split, the same side everywhere and forever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.split import group_hash, heldout_mask

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=2, unique=True).map(lambda x: np.array(x, np.uint64))


def test_a_hash_is_the_same_forever():
    assert group_hash("video 7") == 8972934065191738422
    assert group_hash("") == 13020603013274838756


@given(hashes, st.floats(0.001, 0.999), st.data())
def test_scenes_of_a_group_are_never_on_both_sides(hashes, fraction, data):
    groups = data.draw(st.lists(st.integers(0, len(hashes) - 1), max_size=20))
    groups = np.array([*range(len(hashes)), *groups])
    mask = heldout_mask(hashes[groups], fraction)
    sides = heldout_mask(hashes, fraction)
    np.testing.assert_array_equal(mask, sides[groups])
    assert mask.any()
    assert not mask.all()


def test_the_share_is_about_the_fraction_and_grows_with_it():
    hashes = np.array([group_hash(f"image {i}") for i in range(4000)], np.uint64)
    tenth, third = heldout_mask(hashes, 0.1), heldout_mask(hashes, 0.3)
    assert abs(tenth.mean() - 0.1) < 0.02
    assert abs(third.mean() - 0.3) < 0.03
    assert not (tenth & ~third).any()


def test_among_few_groups_the_lowest_hash_is_held_out():
    high = 2**63
    np.testing.assert_array_equal(
        heldout_mask(np.array([high + 2, high + 1], np.uint64), 0.01), [False, True]
    )
    np.testing.assert_array_equal(heldout_mask(np.array([2, 1, 1], np.uint64), 0.5), [False, True, True])


def test_nothing_is_held_out_at_fraction_0():
    assert not heldout_mask(np.array([0, 1], np.uint64), 0).any()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(UserError, match=rf"^heldout_fraction={fraction}"):
        heldout_mask(np.array([1, 2], np.uint64), fraction)


@pytest.mark.parametrize("count", [1, 3])
def test_a_single_group_can_not_be_on_two_sides(count):
    with pytest.raises(UserError, match=r"^heldout_fraction=0\.5 .*two"):
        heldout_mask(np.full(count, 5, np.uint64), 0.5)


def test_no_scenes_can_not_be_split():
    with pytest.raises(UserError, match="^heldout_fraction.* scenes"):
        heldout_mask(np.zeros(0, np.uint64), 0.5)


def test_the_rule_is_the_same_where_groups_are_missing():
    # With a tiny share only the lowest group is held out; who lacks that group must hold out nothing else.
    hashes = np.array([3, 5, 9], np.uint64) << np.uint64(60)
    assert heldout_mask(hashes, 1e-6).tolist() == [True, False, False]
    extremes = (int(hashes.min()), int(hashes.max()))
    assert heldout_mask(hashes[1:], 1e-6, extremes).tolist() == [False, False]
