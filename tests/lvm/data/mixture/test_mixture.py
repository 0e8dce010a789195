"""Mixtures keep their shares, use every scene once an epoch, and keep the two sides apart."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import BLOCK, ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.store.reader import Store

VIDEO = Video(frames=2, strides=(1,))
PAIRS = Pairs(shots=2)
SCENES = [(1, 0)] * 12 + [(3, 0)] * 9 + [(1, 1)] * 8


def weighted(**weights):
    recipes = {"single": Single(), "video": VIDEO, "pairs": PAIRS}
    return {name: ComponentConfig(recipes[name], weight) for name, weight in weights.items()}


def mixture(store, components, seed=0, split="train", heldout=0.2, **options):
    return Mixture(MixtureConfig(components, store, heldout, **options), seed, split)


@pytest.fixture
def store(make_store):
    return make_store(SCENES)


def scenes_of(component, sentences):
    """The scenes, by their first codes, behind sentences of one single image each."""
    return [component.sentence(number).tobytes() for number in sentences]


def test_components_come_in_the_order_of_their_names(store):
    components = weighted(video=1.0, single=2.0, pairs=1.0)
    assert [component.name for component in mixture(store, components).components] == [
        "pairs",
        "single",
        "video",
    ]
    shuffled = dict(reversed(components.items()))
    np.testing.assert_array_equal(mixture(store, components).block(3), mixture(store, shuffled).block(3))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.1, 0.2, 0.7), (1e-3, 5.0, 1.0), (1.0, 0.0, 3.0)])
def test_shares_are_the_weights_to_within_a_sentence(store, weights):
    components = weighted(pairs=weights[0], single=weights[1], video=weights[2])
    made = mixture(store, components)
    positive = [weight for weight in weights if weight]
    shares = np.array(positive) / sum(positive)
    for block in (0, 1, 17, 10**9):
        ids, _ = made.block(block)
        counts = np.bincount(ids, minlength=len(shares))
        np.testing.assert_allclose(counts, shares * BLOCK, atol=1.001)
        np.testing.assert_allclose(
            made.sentences_before(block), shares * (block * BLOCK), rtol=1e-6, atol=1.001
        )


def test_before_counts_the_sentences_of_all_blocks_before(store):
    made = mixture(store, weighted(pairs=0.3, single=1.1, video=2.0))
    counted = np.zeros(3, int)
    for block in range(40):
        assert made.sentences_before(block) == counted.tolist()
        assert sum(made.sentences_before(block)) == block * BLOCK
        counted += np.bincount(made.block(block)[0], minlength=3)
    assert sum(made.sentences_before(10**12)) == 10**12 * BLOCK


def test_each_component_counts_its_sentences_without_a_gap(store):
    made = mixture(store, weighted(pairs=0.3, single=1.1, video=2.0))
    blocks = [made.block(block) for block in range(5)]
    ids, numbers = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    for component in range(3):
        np.testing.assert_array_equal(
            numbers[ids == component], np.arange(np.count_nonzero(ids == component))
        )


def test_the_order_within_a_block_is_mixed_and_follows_seed_and_block(store):
    components = weighted(single=1.0, video=1.0)
    blocks = [mixture(store, components, seed).block(block)[0] for seed in (0, 1) for block in (0, 1)]
    for one, other in itertools.combinations(blocks, 2):
        assert not np.array_equal(one, other)
    assert np.count_nonzero(np.diff(blocks[0])) > 80
    np.testing.assert_array_equal(blocks[3], mixture(store, components, 1).block(1)[0])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_scene_comes_once_an_epoch_in_another_order(store, split):
    components = {
        "video": ComponentConfig(Video(frames=3, strides=(1,)))
    }  # all of the scene: it tells which it is
    component = mixture(store, components, split=split, heldout=0.4).components[0]
    n = component.sentences_per_epoch
    assert n > 1
    epochs = [scenes_of(component, range(epoch * n, (epoch + 1) * n)) for epoch in range(8)]
    assert all(len(set(epoch)) == n for epoch in epochs)
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_sides_share_no_group_and_together_are_all(make_store, new_scenes):
    groups = [f"group {i // 3}" for i in range(30)]
    store = make_store(new_scenes([(1, 0)] * 30, groups=groups))
    found = Store(store)
    group_of = {found.scene(i).codes.tobytes(): int(found.index["group"][i]) for i in range(30)}
    sides = []
    for split in ("train", "heldout"):
        component = mixture(store, weighted(single=1.0), split=split).components[0]
        codes = {
            component.sentence(i).astype(np.uint16).tobytes() for i in range(component.sentences_per_epoch)
        }
        sides.append({group_of[x] for x in codes})
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(group_of.values())


def test_a_sentence_holds_the_codes_that_its_recipe_chose(store, new_scenes):
    by_rgb = {}
    for item in new_scenes(SCENES):
        if item.scene.stream_set == 1:
            by_rgb[item.scene.codes[0, 0].tobytes()] = item.scene.codes[0, 1]
    component = mixture(store, weighted(pairs=1.0)).components[0]
    for number in range(2 * component.sentences_per_epoch):
        sentence = component.sentence(number)
        assert (sentence.shape, sentence.dtype) == ((4, 4), np.int32)
        for rgb, segmentation in (sentence[:2], sentence[2:]):
            np.testing.assert_array_equal(segmentation, by_rgb[rgb.astype(np.uint16).tobytes()])
        assert not np.array_equal(sentence[0], sentence[2])  # two pairs, two scenes


def test_a_sentence_is_a_function_of_seed_and_number(store):
    components, numbers = weighted(video=1.0), (0, 5, 10**10)
    first, again, other = (
        [mixture(store, components, seed).components[0].sentence(n).tolist() for n in numbers]
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_scenes_too_short_are_left_out_and_counted(store):
    component = mixture(store, weighted(video=1.0), heldout=0.0).components[0]
    assert (component.sentences_per_epoch, component.num_excluded) == (9, 20)


def test_columns_are_found_by_name_whatever_the_stream_set(make_store, new_scenes):
    scenes = new_scenes([(1, 0), (1, 1), (1, 2)])
    columns = {0: 0, 1: 0, 2: 1}  # of rgb in each stream set
    wanted = {item.scene.codes[0, columns[item.scene.stream_set]].tobytes() for item in scenes}
    component = mixture(make_store(scenes), weighted(single=1.0), heldout=0.0).components[0]
    assert {component.sentence(i).astype(np.uint16).tobytes() for i in range(3)} == wanted


def test_all_missing_streams_are_reported_together(store):
    components = {
        "a": ComponentConfig(Single("depth")),
        "b": ComponentConfig(Video(frames=9, strides=(1,))),
        "c": ComponentConfig(Single()),
    }
    with pytest.raises(UserError) as error:
        mixture(store, components)
    assert "a (" in str(error.value)
    assert "≥ 1 frames of depth" in str(error.value)
    assert "b (" in str(error.value)
    assert "≥ 9 frames of rgb" in str(error.value)
    assert "c (" not in str(error.value)


def test_missing_components_may_be_allowed_and_are_said(store, caplog):
    components = {"a": ComponentConfig(Single("depth")), "c": ComponentConfig(Single())}
    made = mixture(store, components, allow_missing=True)
    assert [component.name for component in made.components] == ["c"]
    assert np.bincount(made.block(0)[0]).tolist() == [BLOCK]
    assert "left out of the mixture: a (" in caplog.text


def test_missing_components_can_not_be_all(store):
    with pytest.raises(UserError, match=r"config\.data\.components: can't be made: a \("):
        mixture(store, {"a": ComponentConfig(Single("depth"))}, allow_missing=True)


def test_a_component_of_weight_0_is_not_there_and_needs_no_store(store):
    components = {"a": ComponentConfig(Single(), 0.0, store="nowhere"), "c": ComponentConfig(Single())}
    assert [component.name for component in mixture(store, components).components] == ["c"]


def test_parts_may_have_their_own_stores(store, make_store, new_scenes):
    other = make_store(new_scenes([(1, 2)] * 5, seed=9), "other")
    components = {"here": ComponentConfig(Single()), "there": ComponentConfig(Single("edges"), store=other)}
    made = mixture(store, components, heldout=0.0)
    assert {str(store.path) for store in made.stores} == {store, other}
    edges = {Store(other).scene(i).codes[0, 0].tobytes() for i in range(5)}
    assert {made.components[1].sentence(i).astype(np.uint16).tobytes() for i in range(5)} == edges


@pytest.mark.parametrize(
    ("options", "named"),
    [({"weights": "b" * 64}, r"other: b{12}, grid 2×2"), ({"grid": (1, 4)}, r"other: a{12}, grid 1×4")],
)
def test_codes_of_different_tokenizers_are_refused(store, make_store, options, named):
    other = make_store(SCENES, "other", **options)
    components = {"a": ComponentConfig(Single()), "b": ComponentConfig(Single(), store=other)}
    with pytest.raises(UserError, match=rf"codes of different tokenizers \(.*{named}"):
        mixture(store, components)


def test_too_few_scenes_are_counted(make_store):
    store = make_store([(1, 1)] * 3)
    with pytest.raises(UserError, match=r"made: pairs \(3 train scenes in .*, 4 are needed for a sentence"):
        mixture(store, {"pairs": ComponentConfig(Pairs(shots=4))}, heldout=0.0)


@pytest.mark.parametrize(
    ("components", "store_given", "message"),
    [
        ({}, True, r"config\.data\.components: empty"),
        ({"a": ComponentConfig(Single(), 0.0)}, True, r"config\.data\.components: the weights sum to zero"),
        (
            {"a": ComponentConfig(Single())},
            False,
            r"made: a \(no store given: set config\.data\.components\.a\.store",
        ),
    ],
)
def test_a_mixture_of_nothing_is_refused(store, components, store_given, message):
    with pytest.raises(UserError, match=message):
        mixture(store if store_given else "", components)


@given(st.floats(max_value=-1e-9) | st.sampled_from([float("nan"), float("inf")]))
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(UserError, match=r"^weight: "):
        ComponentConfig(Single(), weight)
