"""Mixtures: shares, order within and across blocks, epochs, the split, and refused configurations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import BLOCK, ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.store.reader import Store
from tests.lvm.conftest import STREAM_SETS

VIDEO = Video(frames=2, strides=(1,))
PAIRS = Pairs(shots=2)
SCENES = [(1, 0)] * 12 + [(3, 0)] * 9 + [(1, 1)] * 8


def weighted(**weights):
    recipes = {"single": Single(), "video": VIDEO, "pairs": PAIRS}
    return {name: ComponentConfig(recipes[name], weight) for name, weight in weights.items()}


def make_mixture(store, components, seed=0, split="train", heldout=0.2, **options):
    return Mixture(MixtureConfig(components, (store,), heldout, **options), seed, split)


@pytest.fixture
def store(make_store):
    return make_store(SCENES)


def sentence_bytes(component, indices):
    """The codes of sentences, which identify their scenes if a sentence shows all of its scene."""
    return [component.sentence(index).astype(np.uint16).tobytes() for index in indices]


def test_components_are_sorted_by_name(store):
    components = weighted(video=1.0, single=2.0, pairs=1.0)
    mixture = make_mixture(store, components)
    assert [component.name for component in mixture.components] == ["pairs", "single", "video"]
    reordered = make_mixture(store, dict(reversed(components.items())))
    np.testing.assert_array_equal(mixture.block(3), reordered.block(3))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.1, 0.2, 0.7), (1e-3, 5.0, 1.0), (1.0, 0.0, 3.0)])
def test_block_shares_are_within_two_sentences_of_weights(store, weights):
    mixture = make_mixture(store, weighted(pairs=weights[0], single=weights[1], video=weights[2]))
    positive = [weight for weight in weights if weight]
    shares = np.array(positive) / sum(positive)
    for block in (0, 1, 17, 10**9):
        ids, _ = mixture.block(block)
        counts = np.bincount(ids, minlength=len(shares))
        np.testing.assert_allclose(counts, shares * BLOCK, atol=2.001)
        before = mixture.sentences_before(block)
        np.testing.assert_allclose(before, shares * (block * BLOCK), rtol=1e-6, atol=1.001)


def test_sentences_before_sums_all_previous_blocks(store):
    mixture = make_mixture(store, weighted(pairs=0.3, single=1.1, video=2.0))
    counts = np.zeros(3, int)
    for block in range(40):
        assert mixture.sentences_before(block) == counts.tolist()
        assert sum(mixture.sentences_before(block)) == block * BLOCK
        counts += np.bincount(mixture.block(block)[0], minlength=3)
    assert sum(mixture.sentences_before(10**12)) == 10**12 * BLOCK


def test_block_sentence_indices_have_no_gap(store):
    mixture = make_mixture(store, weighted(pairs=0.3, single=1.1, video=2.0))
    blocks = [mixture.block(block) for block in range(5)]
    ids, indices = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    for component in range(3):
        expected = np.arange(np.count_nonzero(ids == component))
        np.testing.assert_array_equal(indices[ids == component], expected)


def test_block_order_depends_on_seed_and_block(store):
    components = weighted(single=1.0, video=1.0)
    blocks = [make_mixture(store, components, seed).block(block)[0] for seed in (0, 1) for block in (0, 1)]
    for one, other in itertools.combinations(blocks, 2):
        assert not np.array_equal(one, other)
    assert np.count_nonzero(np.diff(blocks[0])) > 80
    np.testing.assert_array_equal(blocks[3], make_mixture(store, components, 1).block(1)[0])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_epoch_takes_every_scene_once_in_a_new_order(store, split):
    components = {"video": ComponentConfig(Video(frames=3, strides=(1,)))}  # all frames of a scene
    component = make_mixture(store, components, split=split, heldout=0.4).components[0]
    n = component.sentences_per_epoch
    assert n > 1
    epochs = [sentence_bytes(component, range(epoch * n, (epoch + 1) * n)) for epoch in range(8)]
    assert all(len(set(epoch)) == n for epoch in epochs)
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_splits_are_disjoint_by_group_and_complete(make_store, new_scenes):
    groups = [f"group {i // 3}" for i in range(30)]
    path = make_store(new_scenes([(1, 0)] * 30, groups=groups))
    store = Store(path)
    group_of = {store.scene(i).codes.tobytes(): int(store.index["group"][i]) for i in range(30)}
    splits = []
    for split in ("train", "heldout"):
        component = make_mixture(path, weighted(single=1.0), split=split).components[0]
        codes = sentence_bytes(component, range(component.sentences_per_epoch))
        splits.append({group_of[x] for x in codes})
    assert not splits[0] & splits[1]
    assert splits[0] | splits[1] == set(group_of.values())


def test_sentence_has_the_codes_of_its_recipe(store, new_scenes):
    segmentation_of = {}
    for item in new_scenes(SCENES):
        if item.streams == STREAM_SETS[1]:
            segmentation_of[item.codes[0, 0].tobytes()] = item.codes[0, 1]
    component = make_mixture(store, weighted(pairs=1.0)).components[0]
    for index in range(2 * component.sentences_per_epoch):
        sentence = component.sentence(index)
        assert (sentence.shape, sentence.dtype) == ((4, 4), np.int32)
        for rgb, segmentation in (sentence[:2], sentence[2:]):
            expected = segmentation_of[rgb.astype(np.uint16).tobytes()]
            np.testing.assert_array_equal(segmentation, expected)
        assert not np.array_equal(sentence[0], sentence[2])  # two pairs, two scenes


def test_sentence_is_a_function_of_seed_and_index(store):
    components, indices = weighted(video=1.0), (0, 5, 10**10)
    first, again, other = (
        [make_mixture(store, components, seed).components[0].sentence(i).tolist() for i in indices]
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_scenes_too_short_are_excluded_and_counted(store):
    component = make_mixture(store, weighted(video=1.0), heldout=0.0).components[0]
    assert (component.sentences_per_epoch, component.num_excluded) == (9, 20)


def test_streams_are_located_in_every_stream_set(make_store, new_scenes):
    scenes = new_scenes([(1, 0), (1, 1), (1, 2)])
    expected = {item.codes[0, item.streams.index("rgb")].tobytes() for item in scenes}
    component = make_mixture(make_store(scenes), weighted(single=1.0), heldout=0.0).components[0]
    assert set(sentence_bytes(component, range(3))) == expected


def test_missing_streams_are_reported_together(store):
    components = {
        "a": ComponentConfig(Single("depth")),
        "b": ComponentConfig(Video(frames=9, strides=(1,))),
        "c": ComponentConfig(Single()),
    }
    with pytest.raises(UserError) as error:
        make_mixture(store, components)
    assert "a (" in str(error.value)
    assert "≥ 1 frames of depth" in str(error.value)
    assert "b (" in str(error.value)
    assert "≥ 9 frames of rgb" in str(error.value)
    assert "c (" not in str(error.value)


def test_allow_missing_skips_and_logs_components(store, caplog):
    components = {"a": ComponentConfig(Single("depth")), "c": ComponentConfig(Single())}
    mixture = make_mixture(store, components, allow_missing=True)
    assert [component.name for component in mixture.components] == ["c"]
    assert np.bincount(mixture.block(0)[0]).tolist() == [BLOCK]
    assert "skipped component a (" in caplog.text


def test_allow_missing_requires_one_component(store):
    with pytest.raises(UserError, match=r"config\.data\.components: .* a \("):
        make_mixture(store, {"a": ComponentConfig(Single("depth"))}, allow_missing=True)


def test_component_of_weight_0_needs_no_store(store):
    components = {"a": ComponentConfig(Single(), 0.0, store=("nowhere",)), "c": ComponentConfig(Single())}
    assert [component.name for component in make_mixture(store, components).components] == ["c"]


def test_components_may_have_their_own_stores(store, make_store, new_scenes):
    other = make_store(new_scenes([(1, 2)] * 5, seed=9), "other")
    components = {"here": ComponentConfig(Single()), "there": ComponentConfig(Single("edges"), store=(other,))}
    mixture = make_mixture(store, components, heldout=0.0)
    assert {str(store.path) for store in mixture.stores} == {store, other}
    edges = {Store(other).scene(i).codes[0, 0].tobytes() for i in range(5)}
    assert set(sentence_bytes(mixture.components[1], range(5))) == edges


@pytest.mark.parametrize(
    ("options", "named"),
    [({"weights": "b" * 64}, r"other: b{12}, grid 2×2"), ({"grid": (1, 4)}, r"other: a{12}, grid 1×4")],
)
def test_stores_of_different_tokenizers_raise(store, make_store, options, named):
    other = make_store(SCENES, "other", **options)
    components = {"a": ComponentConfig(Single()), "b": ComponentConfig(Single(), store=(other,))}
    with pytest.raises(UserError, match=rf"tokenizers \(.*{named}"):
        make_mixture(store, components)


def test_too_few_scenes_raise_with_their_count(make_store):
    store = make_store([(1, 1)] * 3)
    with pytest.raises(UserError, match=r"pairs \(3 .* train scenes in .* 4\)"):
        make_mixture(store, {"pairs": ComponentConfig(Pairs(shots=4))}, heldout=0.0)


@pytest.mark.parametrize(
    ("components", "has_store", "message"),
    [
        ({}, True, r"config\.data\.components: empty"),
        ({"a": ComponentConfig(Single(), 0.0)}, True, r"config\.data\.components: .* zero"),
        ({"a": ComponentConfig(Single())}, False, r"a \(no store: set config\.data\.components\.NAME\.store"),
    ],
)
def test_empty_mixture_raises(store, components, has_store, message):
    with pytest.raises(UserError, match=message):
        Mixture(MixtureConfig(components, (store,) if has_store else ()), 0)


@given(st.floats(max_value=-1e-9) | st.sampled_from([float("nan"), float("inf")]))
def test_negative_or_infinite_weight_raises(weight):
    with pytest.raises(UserError, match=r"^weight="):
        ComponentConfig(Single(), weight)


def test_unreadable_groups_count_in_the_split(make_store):
    """`make_store` lists groups of the lowest and the highest hash among those that could not be read."""
    components = {"single": ComponentConfig(Single())}
    mixture = make_mixture(make_store([(1, 0)] * 6), components, heldout=1e-9)
    assert mixture.components[0].num_scenes == 6  # the group that is held out isn't there
