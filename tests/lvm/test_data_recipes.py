"""Recipes choose the grids that they promise, and nothing outside of the scenes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.recipes import Grid, Pairs, Recipe, Single, Video
from lvm.errors import UserError

RECIPES = st.one_of(
    st.builds(Single, st.sampled_from(["rgb", "depth"])),
    st.builds(
        Video,
        frames=st.integers(1, 8),
        strides=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(Pairs, target=st.sampled_from(["segmentation", "depth"]), shots=st.integers(1, 8)),
)


@st.composite
def recipes_and_lengths(draw):
    recipe = draw(RECIPES)
    length = st.integers(recipe.min_frames, recipe.min_frames + 20)
    return recipe, draw(st.lists(length, min_size=recipe.num_scenes, max_size=recipe.num_scenes))


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_sentences_have_their_length_and_stay_inside_their_scenes(drawn, seed):
    recipe, lengths = drawn
    grids = recipe.choose(lengths, np.random.default_rng(seed))
    assert len(grids) == recipe.num_grids
    assert {grid.scene for grid in grids} == set(range(recipe.num_scenes))
    assert {grid.stream for grid in grids} == set(recipe.streams)
    assert all(0 <= grid.frame < lengths[grid.scene] for grid in grids)


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_a_sentence_is_a_function_of_its_generator(drawn, seed):
    recipe, lengths = drawn
    first, again = (recipe.choose(lengths, np.random.default_rng(seed)) for _ in range(2))
    assert first == again


def every_sentence(recipe, lengths, draws=400):
    return [recipe.choose(lengths, np.random.default_rng(seed)) for seed in range(draws)]


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
    assert (Video().num_grids, Pairs().num_grids, Single().num_grids) == (16, 16, 1)


def test_recipes_are_known_by_their_kind():
    assert {"single": Single, "video": Video, "pairs": Pairs}.items() <= Recipe.kinds.items()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(frames=0), "frames: 0 is not positive"),
        (lambda: Video(strides=()), r"strides: \(\) must be positive numbers"),
        (lambda: Video(strides=(3, 0)), r"strides: \(3, 0\) must be positive numbers"),
        (lambda: Pairs(shots=0), "shots: 0 is not positive"),
    ],
)
def test_impossible_recipes_are_refused_by_key(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()
