"""Queries, answers and their metrics against values worked out by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.images.sources.scene import SceneInfo
from lvm.data.streams.codecs import Depth, Image, Palette
from lvm.evaluation import prompted
from lvm.evaluation.heldout import Heldout, HeldoutScene
from lvm.evaluation.prompted import Answers, Query, make_queries

CLASSES = Palette(("nothing", "cat", "dog"), background=0)


def bare_scene(index, frames=3):
    info = SceneInfo(f"scene {index}", "", "", frames, ("rgb",))
    return HeldoutScene(info, np.zeros((frames, 1, 1, 1, 3), np.uint8), np.zeros((frames, 1, 3), int))


def render(ids):
    return np.stack([CLASSES.render(np.array(x)) for x in ids])


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_make_queries_uses_distinct_scenes(count, shots, seed):
    scenes = [bare_scene(index) for index in range(count)]
    queries = make_queries(scenes, 20, shots, seed)
    assert len(queries) == (20 if count > shots else 0)
    for query in queries:
        keys = [query.scene.info.key, *(scene.info.key for scene, _ in query.examples)]
        assert len(set(keys)) == shots + 1
        assert all(0 <= frame < 3 for _, frame in query.examples)
        assert 0 <= query.frame < 3


def test_make_queries_cycles_over_scenes():
    scenes = [bare_scene(index) for index in range(5)]
    queries = make_queries(scenes, 50, 2, seed=0)
    assert [query.scene for query in queries] == scenes * 10
    assert {query.frame for query in queries} == {0, 1, 2}
    assert {query.examples[0][0].info.key for query in queries} == {scene.info.key for scene in scenes}


def test_make_queries_is_deterministic_in_seed_and_index():
    scenes = [bare_scene(index) for index in range(5)]
    few, many, other = (make_queries(scenes, n, 2, seed) for n, seed in ((4, 1), (9, 1), (9, 2)))
    assert many[:4] == few
    assert many != other


def test_query_prompt_has_pairs_then_the_query(make_heldout_scenes):
    a, b, c = make_heldout_scenes(3)
    prompt = Query(c, 1, ((a, 0), (b, 1))).prompt("rgb", "segmentation")
    expected = [a.codes[0, 0], a.codes[0, 1], b.codes[1, 0], b.codes[1, 1], c.codes[1, 0]]
    np.testing.assert_array_equal(prompt, expected)


def test_answer_queries_collects_answers_truth_and_copies(make_heldout_scenes, exact_codec):
    scenes, (_, decode) = make_heldout_scenes(4), exact_codec
    queries = make_queries(scenes, 6, 2, seed=0)
    calls = []

    def answer(prompts, num_images):
        calls.append((prompts, num_images))
        return prompts[:, -1:]  # the query itself

    answers = prompted.answer_queries(queries, "rgb", "segmentation", answer, decode)
    np.testing.assert_array_equal(calls[0][0][2], queries[2].prompt("rgb", "segmentation"))
    assert calls[0][0].shape == (6, 5, 48)
    assert calls[0][1] == 1
    for i, query in enumerate(queries):
        np.testing.assert_array_equal(answers.images[i], query.scene.image(query.frame, "rgb"))
        np.testing.assert_array_equal(answers.truth[i], query.scene.image(query.frame, "segmentation"))
        scene, frame = query.examples[-1]
        np.testing.assert_array_equal(answers.copied[i], scene.image(frame, "segmentation"))


def answer_perfectly(scenes, decode, target):
    """Answers of a model that knows the truth of every query."""
    truths = {scene.grid(frame, "rgb").tobytes(): scene.grid(frame, target) for scene in scenes for frame in range(2)}

    def answer(prompts, num_images):
        return np.stack([truths[prompt[-1].tobytes()] for prompt in prompts])[:, None]

    return prompted.answer_queries(make_queries(scenes, 8, 2, seed=0), "rgb", target, answer, decode)


def test_scores_of_perfect_segmentation(make_heldout_scenes, exact_codec):
    scenes = make_heldout_scenes(5, palette=CLASSES)
    scores = answer_perfectly(scenes, exact_codec[1], "segmentation").scores(CLASSES)
    assert scores["num_queries"] == 8
    for name in ("pixel_accuracy", "class_miou", "foreground_iou"):
        assert scores[name] == 1.0
    assert scores["foreground_iou_ci95"] == (1.0, 1.0)
    for name in ("pixel_accuracy_copy_baseline", "class_miou_chance", "foreground_iou_copy_baseline"):
        assert 0 < scores[name] < 1
    assert scores["psnr"] == pytest.approx(100)
    assert scores["psnr_copy_baseline"] < 20


def test_scores_of_perfect_depth(make_heldout_scenes, exact_codec):
    scenes = make_heldout_scenes(4, streams=("rgb", "depth"))
    scores = answer_perfectly(scenes, exact_codec[1], "depth").scores(Depth(1.0, 5.0, "m"))
    assert (scores["rmse"], scores["abs_rel"], scores["delta1"]) == (0, 0, 1)
    assert "pixel_accuracy" not in scores


def test_scores_of_other_streams_are_psnr_alone(make_heldout_scenes, exact_codec):
    scores = answer_perfectly(make_heldout_scenes(4), exact_codec[1], "segmentation").scores(Image())
    assert set(scores) == {"num_queries", "psnr", "psnr_copy_baseline"}


def test_segmentation_metrics_of_known_answers():
    truth = render([[[0, 1], [1, 1]], [[0, 0], [2, 2]]])
    answer = render([[[0, 1], [1, 2]], [[0, 2], [2, 0]]])
    copied = render([[[0, 0], [0, 0]], [[0, 0], [2, 2]]])
    scores = prompted.segmentation_metrics(answer, truth, copied, CLASSES)
    assert scores["pixel_accuracy"] == pytest.approx(5 / 8)
    assert scores["pixel_accuracy_copy_baseline"] == pytest.approx(5 / 8)
    # Cat: 2 true positives of 3, no false ones. Dog: 1 of 2, 2 false ones.
    assert scores["class_miou"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert scores["foreground_iou"] == pytest.approx((1 + 1 / 3) / 2)
    assert scores["foreground_iou_all_foreground"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert scores["foreground_iou_copy_baseline"] == pytest.approx((0 + 1) / 2)


def test_segmentation_metrics_skip_void_pixels():
    codec = Palette(("nothing", "cat", "unknown"), background=0, ignore=2)
    draw = lambda ids: codec.render(np.array(ids))[None]  # noqa: E731
    scores = prompted.segmentation_metrics(draw([[0, 1]]), draw([[2, 1]]), draw([[0, 0]]), codec)
    assert scores["pixel_accuracy"] == 1.0
    assert scores["class_miou"] == 1.0


@pytest.mark.parametrize("background_rows", [0, 2])
def test_class_miou_chance_level(background_rows):
    codec = Palette(("nothing", *"abcd"), background=0)
    ids = np.random.default_rng(0).integers(1, 5, (60, 1, 1)) * np.ones((1, 4, 4), int)  # one class an image
    ids[:, :background_rows] = 0  # neither permuted nor averaged
    images = np.stack([codec.render(x) for x in ids])
    scores = prompted.segmentation_metrics(images, images, images, codec)
    assert scores["class_miou"] == 1.0
    assert scores["class_miou_chance"] == pytest.approx(1 / 7, abs=0.02)  # accuracy 1/4, so IoU 1/(4 + 4 − 1)


STREAMS = ["rgb", "segmentation", "depth"]


class FakeHeldout(Heldout):
    """Held-out scenes whose streams have disjoint codes: those of `rgb` lie in 0..9, and so on."""

    def __init__(self, scenes):
        self.codecs = dict.fromkeys(STREAMS)
        self._scenes = scenes

    def codes(self, stream):
        return np.stack([scene.grid(0, stream) for scene in self._scenes])


def with_disjoint_codes(scene):
    codes = scene.codes % 10 + 10 * np.arange(len(STREAMS))[:, None]  # [T, S, N]
    return dataclasses.replace(scene, codes=codes)


def make_answers(scenes, target, answer_stream):
    """Answers to a query of each scene: its own stream `answer_stream(scene)`, slightly perturbed in pixels."""
    queries = [Query(scene, 0, ()) for scene in scenes]
    codes = np.stack([scene.grid(0, answer_stream(scene)) for scene in scenes])
    images = np.stack([scene.image(0, answer_stream(scene)) for scene in scenes]).astype(int) + 3
    empty = np.zeros(images.shape, np.uint8)
    return Answers(queries, "rgb", target, codes, images.clip(0, 255).astype(np.uint8), empty, empty)


def test_task_following_of_known_answers(make_heldout_scenes):
    scenes = [with_disjoint_codes(scene) for scene in make_heldout_scenes(4, streams=STREAMS, frames=1)]
    perfect_answers = make_answers(scenes, "segmentation", lambda scene: "segmentation")
    some_wrong = make_answers(scenes, "depth", lambda scene: "depth" if scene is scenes[0] else "rgb")
    shares = prompted.task_following([perfect_answers, some_wrong], FakeHeldout(scenes), num_codes=30)
    expected = {"all": 0.625, "segmentation": 1.0, "depth": 0.25}
    assert shares == {"by_codes": expected, "by_pixels": expected, "judge_accuracy": 1.0}


def test_task_following_by_codes_ignores_content(make_heldout_scenes):
    scenes = [with_disjoint_codes(scene) for scene in make_heldout_scenes(4, streams=STREAMS, frames=1)]
    answers = make_answers(scenes, "segmentation", lambda scene: "segmentation")
    black = dataclasses.replace(answers, images=np.zeros_like(answers.images))
    shares = prompted.task_following([black], FakeHeldout(scenes), num_codes=30)
    assert shares["by_codes"]["all"] == 1.0
    assert shares["by_pixels"]["all"] < 1.0
