"""Queries are fair, perfect answers score full marks, and the scores are those worked by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.images.sources.base import SceneInfo
from lvm.data.streams.codecs import Depth, Image, Palette
from lvm.evaluation import prompted
from lvm.evaluation.heldout import HeldoutScene
from lvm.evaluation.prompted import Answers, Query, make_queries

CLASSES = Palette(("nothing", "cat", "dog"), background=0)


def bare_scene(number, frames=3):
    info = SceneInfo(f"scene {number}", "", "", frames, ("rgb",))
    return HeldoutScene(info, np.zeros((frames, 1, 1, 1, 3), np.uint8), np.zeros((frames, 1, 3), int))


def labelled(ids):
    return np.stack([CLASSES.render(np.array(x)) for x in ids])


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_no_query_is_among_its_own_examples_nor_an_example_twice(count, shots, seed):
    scenes = [bare_scene(number) for number in range(count)]
    queries = make_queries(scenes, 20, shots, seed)
    assert len(queries) == (20 if count > shots else 0)
    for query in queries:
        keys = [query.scene.info.key, *(scene.info.key for scene, _ in query.examples)]
        assert len(set(keys)) == shots + 1
        assert all(0 <= frame < 3 for _, frame in query.examples)
        assert 0 <= query.frame < 3


def test_queries_go_over_all_scenes_in_turn_and_draw_frames_and_examples():
    scenes = [bare_scene(number) for number in range(5)]
    queries = make_queries(scenes, 50, 2, seed=0)
    assert [query.scene for query in queries] == scenes * 10
    assert {query.frame for query in queries} == {0, 1, 2}
    assert {query.examples[0][0].info.key for query in queries} == {scene.info.key for scene in scenes}


def test_queries_are_a_function_of_the_seed_and_of_their_number():
    scenes = [bare_scene(number) for number in range(5)]
    few, many, other = (make_queries(scenes, n, 2, seed) for n, seed in ((4, 1), (9, 1), (9, 2)))
    assert many[:4] == few
    assert many != other


def test_a_prompt_shows_the_examples_in_pairs_and_then_the_query(make_heldout_scenes):
    a, b, c = make_heldout_scenes(3)
    prompt = Query(c, 1, ((a, 0), (b, 1))).prompt("rgb", "segmentation")
    wanted = [a.codes[0, 0], a.codes[0, 1], b.codes[1, 0], b.codes[1, 1], c.codes[1, 0]]
    np.testing.assert_array_equal(prompt, wanted)


def test_asking_gives_the_prompts_and_collects_answers_truth_and_the_last_example(
    make_heldout_scenes, exact_codec
):
    scenes, (_, decode) = make_heldout_scenes(4), exact_codec
    queries = make_queries(scenes, 6, 2, seed=0)
    seen = []

    def answer(prompts, num_images):
        seen.append((prompts, num_images))
        return prompts[:, -1:]  # the query itself

    asked = prompted.answer_queries(queries, "rgb", "segmentation", answer, decode)
    np.testing.assert_array_equal(seen[0][0][2], queries[2].prompt("rgb", "segmentation"))
    assert seen[0][0].shape == (6, 5, 48)
    assert seen[0][1] == 1
    for i, query in enumerate(queries):
        np.testing.assert_array_equal(asked.images[i], query.scene.image(query.frame, "rgb"))
        np.testing.assert_array_equal(asked.truth[i], query.scene.image(query.frame, "segmentation"))
        scene, frame = query.examples[-1]
        np.testing.assert_array_equal(asked.copied[i], scene.image(frame, "segmentation"))


def perfect(scenes, decode, target):
    """Answers of a model that knows the truth by the query."""
    truths = {
        scene.grid(frame, "rgb").tobytes(): scene.grid(frame, target)
        for scene in scenes
        for frame in range(2)
    }

    def answer(prompts, num_images):
        return np.stack([truths[prompt[-1].tobytes()] for prompt in prompts])[:, None]

    return prompted.answer_queries(make_queries(scenes, 8, 2, seed=0), "rgb", target, answer, decode)


def test_perfect_answers_score_full_marks(make_heldout_scenes, exact_codec):
    scenes = make_heldout_scenes(5, palette=CLASSES)
    figures = perfect(scenes, exact_codec[1], "segmentation").scores(CLASSES)
    assert figures["num_queries"] == 8
    for name in ("pixel_accuracy", "class_miou", "foreground_iou"):
        assert figures[name] == 1.0
    assert figures["foreground_iou_ci95"] == (1.0, 1.0)
    for name in ("pixel_accuracy_copy_baseline", "class_miou_chance", "foreground_iou_copy_baseline"):
        assert 0 < figures[name] < 1
    assert figures["psnr"] == pytest.approx(100)
    assert figures["psnr_copy_baseline"] < 20


def test_perfect_depth_scores_full_marks_and_no_labels(make_heldout_scenes, exact_codec):
    scenes = make_heldout_scenes(4, streams=("rgb", "depth"))
    figures = perfect(scenes, exact_codec[1], "depth").scores(Depth(1.0, 5.0, "m"))
    assert (figures["rmse"], figures["abs_rel"], figures["delta1"]) == (0, 0, 1)
    assert "pixel_accuracy" not in figures


def test_other_streams_are_scored_by_psnr_alone(make_heldout_scenes, exact_codec):
    figures = perfect(make_heldout_scenes(4), exact_codec[1], "segmentation").scores(Image())
    assert set(figures) == {"num_queries", "psnr", "psnr_copy_baseline"}


def test_segmentation_scores_of_known_answers():
    truth = labelled([[[0, 1], [1, 1]], [[0, 0], [2, 2]]])
    answer = labelled([[[0, 1], [1, 2]], [[0, 2], [2, 0]]])
    copied = labelled([[[0, 0], [0, 0]], [[0, 0], [2, 2]]])
    figures = prompted.segmentation_metrics(answer, truth, copied, CLASSES)
    assert figures["pixel_accuracy"] == pytest.approx(5 / 8)
    assert figures["pixel_accuracy_copy_baseline"] == pytest.approx(5 / 8)
    # Cats: 2 of 3 found, none too many. Dogs: 1 of 2 found, 2 too many.
    assert figures["class_miou"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert figures["foreground_iou"] == pytest.approx((1 + 1 / 3) / 2)
    assert figures["foreground_iou_all_foreground"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert figures["foreground_iou_copy_baseline"] == pytest.approx((0 + 1) / 2)


def test_pixels_whose_truth_nobody_knows_do_not_count():
    codec = Palette(("nothing", "cat", "unknown"), background=0, ignore=2)
    draw = lambda ids: codec.render(np.array(ids))[None]  # noqa: E731
    figures = prompted.segmentation_metrics(draw([[0, 1]]), draw([[2, 1]]), draw([[0, 0]]), codec)
    assert figures["pixel_accuracy"] == 1.0
    assert figures["class_miou"] == 1.0


def test_classes_by_lot_are_right_as_often_as_there_are_classes():
    codec = Palette(("nothing", *"abcd"), background=0)
    ids = np.random.default_rng(0).integers(1, 5, (60, 1, 1)) * np.ones((1, 4, 4), int)  # one class an image
    images = np.stack([codec.render(x) for x in ids])
    figures = prompted.segmentation_metrics(images, images, images, codec)
    assert figures["class_miou"] == 1.0
    assert figures["class_miou_chance"] == pytest.approx(1 / 7, abs=0.02)  # a quarter right: 1 of 4 + 4 − 1


STREAMS = ["rgb", "segmentation", "depth"]


class KnownHeldout:
    """Held-out scenes in which each stream has codes of its own: those of `rgb` lie in 0..9, and so on."""

    def __init__(self, scenes):
        self.codecs = dict.fromkeys(STREAMS)
        self._scenes = scenes

    def codes(self, stream):
        return np.stack([scene.grid(0, stream) for scene in self._scenes])


def with_known_codes(scene):
    codes = scene.codes % 10 + 10 * np.arange(len(STREAMS))[:, None]  # [T, S, N]
    return dataclasses.replace(scene, codes=codes)


def answers_of(scenes, target, shown):
    """Answers to a query of each scene: its own stream `shown(scene)`, in pixels a little disturbed."""
    queries = [Query(scene, 0, ()) for scene in scenes]
    codes = np.stack([scene.grid(0, shown(scene)) for scene in scenes])
    images = np.stack([scene.image(0, shown(scene)) for scene in scenes]).astype(int) + 3
    empty = np.zeros_like(images)
    return Answers(queries, "rgb", target, codes, images.clip(0, 255).astype(np.uint8), empty, empty)


def test_task_following_is_the_share_of_answers_of_the_stream_shown(make_heldout_scenes):
    scenes = [with_known_codes(scene) for scene in make_heldout_scenes(4, streams=STREAMS, frames=1)]
    always = answers_of(scenes, "segmentation", lambda scene: "segmentation")
    sometimes = answers_of(scenes, "depth", lambda scene: "depth" if scene is scenes[0] else "rgb")
    shares = prompted.task_following([always, sometimes], KnownHeldout(scenes), num_codes=30)
    wanted = {"all": 0.625, "segmentation": 1.0, "depth": 0.25}
    assert shares == {"by_codes": wanted, "by_pixels": wanted, "judge_accuracy": 1.0}


def test_an_answer_of_the_right_kind_but_of_another_query_follows_by_codes_alone(make_heldout_scenes):
    scenes = [with_known_codes(scene) for scene in make_heldout_scenes(4, streams=STREAMS, frames=1)]
    answers = answers_of(scenes, "segmentation", lambda scene: "segmentation")
    black = dataclasses.replace(answers, images=np.zeros_like(answers.images))
    shares = prompted.task_following([black], KnownHeldout(scenes), num_codes=30)
    assert shares["by_codes"]["all"] == 1.0
    assert shares["by_pixels"]["all"] < 1.0
