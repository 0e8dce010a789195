"""Recipes: the grids of sentences, their distributions, and refused fields."""

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
    VaryingPairs,
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
    st.builds(VaryingPairs, targets=st.just(("depth", "edges", "normals")), shots=st.integers(1, 4)),
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


def test_recipes_default_to_the_papers_sentences():
    defaults = {kind: vars(cls()) for kind, cls in Recipe.kinds.items()}
    strided = {"frames": 8, "strides": (10, 20, 30), "input": "rgb", "target": "segmentation"}
    annotations = ("segmentation", "depth", "normals", "edges")
    assert defaults == {
        "single": {"stream": "rgb"},
        "video": {"stream": "rgb", "frames": 16, "strides": (10, 20, 30)},
        "rotation": {"stream": "rgb", "views": 24, "step": 1},
        "category": {"stream": "rgb", "images": 16},
        "pairs": {"input": "rgb", "target": "segmentation", "shots": 8, "same_class": False},
        "varying_pairs": {"input": "rgb", "targets": ("segmentation", "depth"), "shots": 8, "same_class": False},
        "multi_annotation": {"input": "rgb", "annotations": annotations, "num_streams": 4, "shots": 4},
        "interleaved": strided,
        "separated": strided,
    }


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_sample_one_stays_within_its_scenes(example, seed):
    recipe, lengths = example
    grids = recipe.sample_one(lengths, np.random.default_rng(seed))
    assert len(grids) == recipe.num_grids
    assert {grid.scene for grid in grids} == set(range(recipe.num_scenes))
    streams = {grid.stream for grid in grids}
    assert streams <= set(recipe.streams)
    assert len(streams) == (
        2 if isinstance(recipe, VaryingPairs) else getattr(recipe, "num_streams", len(recipe.streams))
    )
    assert len(set(grids)) == len(grids)
    assert (recipe.answer_mask.shape, recipe.answer_mask.dtype) == ((recipe.num_grids,), bool)
    assert all(0 <= grid.frame < lengths[grid.scene] for grid in grids)


@given(recipes_and_lengths(), st.integers(0, 2**32))
def test_sample_one_is_a_function_of_its_generator(example, seed):
    recipe, lengths = example
    first, again = (recipe.sample_one(lengths, np.random.default_rng(seed)) for _ in range(2))
    assert first == again


@given(recipes_and_lengths(), st.integers(0, 2**32), st.integers(1, 5))
def test_sample_is_independent_across_sentences(example, seed, count):
    recipe, lengths = example
    counters = np.arange(count)
    together = recipe.sample(np.tile(lengths, (count, 1)), CounterRng(seed, counters))
    for i in range(count):
        alone = recipe.sample(np.array([lengths]), CounterRng(seed, counters[i : i + 1]))
        for name in ("scenes", "frames", "streams"):
            assert getattr(together, name)[i].tolist() == getattr(alone, name)[0].tolist()


def test_rotation_starts_anywhere_and_covers_one_revolution():
    frames = {tuple(grid.frame for grid in s) for s in every_sentence(Rotation(views=3, step=2), [7])}
    assert frames == {tuple((start + i) % 7 for i in (0, 2, 4)) for start in range(7)}
    revolutions = every_sentence(Rotation(), [24], 50)
    assert all(sorted(grid.frame for grid in sentence) == list(range(24)) for sentence in revolutions)
    assert Rotation(views=3, step=2).min_frames == 6


def test_category_takes_a_random_frame_of_each_scene():
    sentences = every_sentence(Category(images=2), [2, 3])
    assert all([grid.scene for grid in sentence] == [0, 1] for sentence in sentences)
    assert {(a.frame, b.frame) for a, b in sentences} == {(i, j) for i in range(2) for j in range(3)}


def test_varying_pairs_keep_one_target_within_a_sentence():
    recipe = VaryingPairs("rgb", ("depth", "edges"), shots=2)
    sentences = every_sentence(recipe, [2, 3])
    for a, b, c, d in sentences:
        assert [grid.scene for grid in (a, b, c, d)] == [0, 0, 1, 1]
        assert (a.stream, c.stream) == ("rgb", "rgb")
        assert b.stream == d.stream
        assert (a.frame, c.frame) == (b.frame, d.frame)
    assert {(s[1].stream, s[0].frame, s[2].frame) for s in sentences} == {
        (stream, i, j) for stream in ("depth", "edges") for i in range(2) for j in range(3)
    }
    assert recipe.answer_mask.tolist() == [False, True, False, True]


def test_multi_annotation_keeps_one_order_within_a_sentence():
    recipe = MultiAnnotation("rgb", ("depth", "edges"), num_streams=2, shots=2)
    orders = set()
    for a, b, c, d in every_sentence(recipe, [1, 3]):
        assert [grid.scene for grid in (a, b, c, d)] == [0, 0, 1, 1]
        assert (a.stream, b.stream) == (c.stream, d.stream)
        assert c.frame == d.frame
        orders.add((a.stream, b.stream))
    assert len(orders) == 6  # two of three, in order
    assert recipe.answer_mask.tolist() == [False, True, False, True]


def test_annotated_videos_interleave_or_separate_annotations():
    interleaved = {
        tuple((g.frame, g.stream) for g in s) for s in every_sentence(Interleaved(frames=2, strides=(2,)), [4])
    }
    separated = {tuple((g.frame, g.stream) for g in s) for s in every_sentence(Separated(frames=2, strides=(2,)), [4])}
    x, y = "rgb", "segmentation"
    assert interleaved == {((i, x), (i, y), (i + 2, x), (i + 2, y)) for i in (0, 1)}
    assert separated == {((i, x), (i + 2, x), (i, y), (i + 2, y)) for i in (0, 1)}
    assert Interleaved(frames=2).answer_mask.tolist() == [False, True, False, True]
    assert Separated(frames=2).answer_mask.tolist() == [False, False, True, True]


def test_counter_rng_is_uniform():
    counts = np.bincount(CounterRng(3, np.arange(9000)).integers(np.full(9000, 9)), minlength=9)
    assert abs(counts - 1000).max() < 150  # standard deviation 30
    orders = {tuple(order) for order in CounterRng(5, np.arange(300)).permutations(3).tolist()}
    assert len(orders) == 6


def every_sentence(recipe, lengths, count=400):
    return [recipe.sample_one(lengths, np.random.default_rng(seed)) for seed in range(count)]


def test_single_takes_every_frame():
    assert {s[0] for s in every_sentence(Single(), [5])} == {Grid(0, frame, "rgb") for frame in range(5)}


def test_video_takes_every_stride_that_fits_and_every_start():
    video = Video(frames=3, strides=(1, 2, 5))
    frames = {tuple(grid.frame for grid in sentence) for sentence in every_sentence(video, [7])}
    by_one = {(i, i + 1, i + 2) for i in range(5)}
    by_two = {(i, i + 2, i + 4) for i in range(3)}
    assert frames == by_one | by_two  # stride 5 would need 11 frames


def test_shortest_scene_has_one_video():
    assert Video().min_frames == 151
    frames = {tuple(grid.frame for grid in s) for s in every_sentence(Video(), [151], 20)}
    assert frames == {tuple(range(0, 151, 10))}


def test_pairs_alternate_an_image_and_its_annotation():
    pairs = Pairs("rgb", "depth", shots=2)
    for first, second, third, fourth in every_sentence(pairs, [3, 4], 50):
        assert (first.scene, second.scene, third.scene, fourth.scene) == (0, 0, 1, 1)
        assert (first.stream, second.stream, third.stream, fourth.stream) == ("rgb", "depth") * 2
        assert first.frame == second.frame
        assert third.frame == fourth.frame
    assert {(s[0].frame, s[2].frame) for s in every_sentence(pairs, [3, 4])} == {
        (i, j) for i in range(3) for j in range(4)
    }


def test_defaults_are_the_papers():
    assert (Video().frames, Video().strides, Pairs().shots) == (16, (10, 20, 30), 8)
    assert (Rotation().views, Category().images, Interleaved().frames, Separated().frames) == (24, 16, 8, 8)
    assert (Video().num_grids, Pairs().num_grids, Single().num_grids) == (16, 16, 1)


def test_recipe_kinds():
    kinds = {"single": Single, "video": Video, "pairs": Pairs, "rotation": Rotation, "category": Category}
    kinds |= {
        "varying_pairs": VaryingPairs,
        "multi_annotation": MultiAnnotation,
        "interleaved": Interleaved,
        "separated": Separated,
    }
    assert Recipe.kinds == kinds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(frames=0), "frames=0"),
        (lambda: Video(strides=()), r"strides=\(\)"),
        (lambda: Video(strides=(3, 0)), r"strides=\(3, 0\)"),
        (lambda: Pairs(shots=0), "shots=0"),
        (lambda: Pairs("rgb", "rgb"), "target='rgb' .* input"),
        (lambda: Rotation(step=0), "step=0"),
        (lambda: Category(images=0), "images=0"),
        (lambda: VaryingPairs(targets=("depth",)), r"targets=\('depth',\) .* two streams or more"),
        (lambda: VaryingPairs(targets=("rgb", "depth")), r"targets=.* without 'rgb'"),
        (lambda: VaryingPairs(targets=("depth", "depth")), "targets=.* each once"),
        (lambda: VaryingPairs(targets="ab"), "targets='ab' must be a tuple"),
        (lambda: MultiAnnotation(num_streams=6), "num_streams=6 .* 2 to 5"),
        (lambda: MultiAnnotation(annotations=("rgb",)), "annotations=.*repeat"),
        (lambda: Interleaved(target="rgb"), "target='rgb' .* input"),
        (lambda: Separated(strides=(0,)), r"strides=\(0,\)"),
    ],
)
def test_impossible_recipe_raises_with_its_field(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()
