"""Recipes choose the grids that they promise, and nothing outside of the scenes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.recipes import (
    Category,
    Grid,
    Interleaved,
    MultiAnnotation,
    Pairs,
    Recipe,
    Rotation,
    Separated,
    Single,
    Video,
)

RECIPES = st.one_of(
    st.builds(Single, st.sampled_from(["rgb", "depth"])),
    st.builds(
        Video,
        frames=st.integers(1, 8),
        strides=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(Pairs, target=st.sampled_from(["segmentation", "depth"]), shots=st.integers(1, 8)),
    st.builds(Rotation, views=st.integers(1, 6), step=st.integers(1, 3)),
    st.builds(Category, images=st.integers(1, 6)),
    st.builds(MultiAnnotation, num_streams=st.integers(2, 5), shots=st.integers(1, 4)),
    *(
        st.builds(
            kind,
            frames=st.integers(1, 5),
            strides=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        )
        for kind in (Interleaved, Separated)
    ),
)


@st.composite
def recipes_and_lengths(draw):
    recipe = draw(RECIPES)
    length = st.integers(recipe.min_frames, recipe.min_frames + 20)
    return recipe, draw(st.lists(length, min_size=recipe.num_scenes, max_size=recipe.num_scenes))


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_sentences_have_their_length_and_stay_inside_their_scenes(drawn, seed):
    recipe, lengths = drawn
    grids = recipe.sample_one(lengths, np.random.default_rng(seed))
    assert len(grids) == recipe.num_grids
    assert {grid.scene for grid in grids} == set(range(recipe.num_scenes))
    shown = {grid.stream for grid in grids}
    assert shown <= set(recipe.streams)
    assert len(shown) == getattr(recipe, "num_streams", len(recipe.streams))
    assert len(set(grids)) == len(grids)
    assert (recipe.answer_mask.shape, recipe.answer_mask.dtype) == ((recipe.num_grids,), bool)
    assert all(0 <= grid.frame < lengths[grid.scene] for grid in grids)


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_a_sentence_is_a_function_of_its_generator(drawn, seed):
    recipe, lengths = drawn
    first, again = (recipe.sample_one(lengths, np.random.default_rng(seed)) for _ in range(2))
    assert first == again


@given(recipes_and_lengths(), st.integers(0, 2**32), st.integers(1, 5))
def test_many_sentences_are_each_what_it_is_alone(drawn, seed, count):
    recipe, lengths = drawn
    places = np.arange(count)
    together = recipe.sample(np.tile(lengths, (count, 1)), CounterRng(seed, places))
    for place in range(count):
        alone = recipe.sample(np.array([lengths]), CounterRng(seed, places[place : place + 1]))
        for name in ("scenes", "frames", "streams"):
            assert getattr(together, name)[place].tolist() == getattr(alone, name)[0].tolist()


def test_a_rotation_begins_at_every_view_and_goes_once_around():
    found = {tuple(grid.frame for grid in s) for s in every_sentence(Rotation(views=3, step=2), [7])}
    assert found == {tuple((start + i) % 7 for i in (0, 2, 4)) for start in range(7)}
    whole = every_sentence(Rotation(), [24], 50)
    assert all(sorted(grid.frame for grid in sentence) == list(range(24)) for sentence in whole)
    assert Rotation(views=3, step=2).min_frames == 6


def test_a_category_shows_each_of_its_scenes_once_in_any_frame():
    found = every_sentence(Category(images=2), [2, 3])
    assert all([grid.scene for grid in sentence] == [0, 1] for sentence in found)
    assert {(a.frame, b.frame) for a, b in found} == {(i, j) for i in range(2) for j in range(3)}


def test_annotations_come_in_one_order_for_all_scenes_and_every_order_comes():
    recipe = MultiAnnotation("rgb", ("depth", "edges"), num_streams=2, shots=2)
    orders = set()
    for a, b, c, d in every_sentence(recipe, [1, 3]):
        assert [grid.scene for grid in (a, b, c, d)] == [0, 0, 1, 1]
        assert (a.stream, b.stream) == (c.stream, d.stream)
        assert c.frame == d.frame
        orders.add((a.stream, b.stream))
    assert len(orders) == 6  # two of three, in order
    assert recipe.answer_mask.tolist() == [False, True, False, True]


def test_annotated_videos_lay_frames_and_annotations_in_turn_or_one_after_the_other():
    in_turn = {
        tuple((g.frame, g.stream) for g in s)
        for s in every_sentence(Interleaved(frames=2, strides=(2,)), [4])
    }
    after = {
        tuple((g.frame, g.stream) for g in s) for s in every_sentence(Separated(frames=2, strides=(2,)), [4])
    }
    x, y = "rgb", "segmentation"
    assert in_turn == {((i, x), (i, y), (i + 2, x), (i + 2, y)) for i in (0, 1)}
    assert after == {((i, x), (i + 2, x), (i, y), (i + 2, y)) for i in (0, 1)}
    assert Interleaved(frames=2).answer_mask.tolist() == [False, True, False, True]
    assert Separated(frames=2).answer_mask.tolist() == [False, False, True, True]


def test_draws_are_even():
    counts = np.bincount(CounterRng(3, np.arange(9000)).integers(np.full(9000, 9)), minlength=9)
    assert abs(counts - 1000).max() < 150  # standard deviation 30
    orders = {tuple(order) for order in CounterRng(5, np.arange(300)).permutations(3).tolist()}
    assert len(orders) == 6


def every_sentence(recipe, lengths, draws=400):
    return [recipe.sample_one(lengths, np.random.default_rng(seed)) for seed in range(draws)]


def test_every_frame_can_be_the_single_image():
    assert {s[0] for s in every_sentence(Single(), [5])} == {Grid(0, frame, "rgb") for frame in range(5)}


def test_videos_take_every_stride_that_fits_and_every_start():
    video = Video(frames=3, strides=(1, 2, 5))
    found = {tuple(grid.frame for grid in sentence) for sentence in every_sentence(video, [7])}
    by_one = {(i, i + 1, i + 2) for i in range(5)}
    by_two = {(i, i + 2, i + 4) for i in range(3)}
    assert found == by_one | by_two  # stride 5 would need 11 frames


def test_a_scene_of_the_shortest_length_has_one_video():
    assert Video().min_frames == 151
    found = {tuple(grid.frame for grid in s) for s in every_sentence(Video(), [151], 20)}
    assert found == {tuple(range(0, 151, 10))}


def test_pairs_show_an_image_and_its_own_annotation_in_turn():
    pairs = Pairs("rgb", "depth", shots=2)
    for first, second, third, fourth in every_sentence(pairs, [3, 4], 50):
        assert (first.scene, second.scene, third.scene, fourth.scene) == (0, 0, 1, 1)
        assert (first.stream, second.stream, third.stream, fourth.stream) == ("rgb", "depth") * 2
        assert first.frame == second.frame
        assert third.frame == fourth.frame
    assert {(s[0].frame, s[2].frame) for s in every_sentence(pairs, [3, 4])} == {
        (i, j) for i in range(3) for j in range(4)
    }


def test_the_papers_numbers_are_the_defaults():
    assert (Video().frames, Video().strides, Pairs().shots) == (16, (10, 20, 30), 8)
    assert (Rotation().views, Category().images, Interleaved().frames, Separated().frames) == (24, 16, 8, 8)
    assert (Video().num_grids, Pairs().num_grids, Single().num_grids) == (16, 16, 1)


def test_recipes_are_known_by_their_kind():
    kinds = {"single": Single, "video": Video, "pairs": Pairs, "rotation": Rotation, "category": Category}
    kinds |= {"multi_annotation": MultiAnnotation, "interleaved": Interleaved, "separated": Separated}
    assert Recipe.kinds == kinds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(frames=0), "frames: 0 is not positive"),
        (lambda: Video(strides=()), r"strides: \(\) must be positive numbers"),
        (lambda: Video(strides=(3, 0)), r"strides: \(3, 0\) must be positive numbers"),
        (lambda: Pairs(shots=0), "shots: 0 is not positive"),
        (lambda: Pairs("rgb", "rgb"), "target: 'rgb' is the input too"),
        (lambda: Rotation(step=0), "step: 0 is not positive"),
        (lambda: Category(images=0), "images: 0 is not positive"),
        (lambda: MultiAnnotation(num_streams=6), "num_streams: 6 is not from 2 to 5"),
        (lambda: MultiAnnotation(annotations=("rgb",)), "annotations: .* name a stream twice"),
        (lambda: Interleaved(target="rgb"), "target: 'rgb' is the input too"),
        (lambda: Separated(strides=(0,)), r"strides: \(0,\) must be positive"),
    ],
)
def test_impossible_recipes_are_refused_by_key(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()
