"""Segmentation scores against values worked out by hand."""

import dataclasses

import numpy as np
import pytest

from lvm.data.streams.codecs import Image, Palette
from lvm.evaluation.episodes import Query
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.figures import estimate

CLASSES = Palette(("nothing", "cat", "dog"), background=0)


def render(ids, codec=CLASSES):
    return np.stack([codec.render(np.array(x)) for x in ids])


@pytest.fixture
def scores(make_heldout_scenes):
    """(answer, truth, codec, classes of the queries) → figures."""

    def score(answer, truth, codec=CLASSES, class_names=("a", "b")):
        scenes = make_heldout_scenes(len(answer))
        infos = [dataclasses.replace(s.info, class_name=n) for s, n in zip(scenes, class_names, strict=False)]
        queries = [Query(dataclasses.replace(s, info=i), 0, ()) for s, i in zip(scenes, infos, strict=True)]
        task = Segmentation()
        statistics = task.score(codec, render(answer, codec), render(truth, codec), queries)
        return {m.name: estimate(statistics[m.name], m.aggregate).value for m in task.metrics(codec)}

    return score


def test_segmentation_scores_of_known_answers(scores):
    truth = [[[0, 1], [1, 1]], [[0, 0], [2, 2]]]
    answer = [[[0, 1], [1, 2]], [[0, 2], [2, 0]]]
    figures = scores(answer, truth)
    assert figures["pixel_accuracy"] == pytest.approx(5 / 8)
    # Cat: 2 true positives of 3, no false ones. Dog: 1 of 2, 2 false ones.
    assert figures["class_miou"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert figures["foreground_iou"] == pytest.approx((1 + 1 / 3) / 2)
    assert figures["foreground_miou"] == pytest.approx((1 + 1 / 3) / 2)  # each query is a class of its own


def test_foreground_miou_sums_the_queries_of_a_class(scores):
    truth = [[[1, 1], [1, 1]], [[0, 0], [0, 1]], [[1, 0], [0, 0]]]
    answer = [[[1, 1], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]]]
    figures = scores(answer, truth, class_names=("a", "a", "b"))
    assert figures["foreground_iou"] == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert figures["foreground_miou"] == pytest.approx(((2 + 1) / (4 + 1) + 0) / 2)


def test_void_is_background_to_the_foreground_and_skipped_by_classes(scores):
    codec = Palette(("nothing", "cat", "unknown"), background=0, ignore=2)
    figures = scores([[[0, 1]]], [[[2, 1]]], codec)
    assert figures == {"foreground_iou": 1, "foreground_miou": 1, "class_miou": 1, "pixel_accuracy": 1}
    all_void = scores([[[0, 1]]], [[[2, 2]]], codec)
    assert all_void["foreground_iou"] == 0  # the mask that should be empty isn't
    assert np.isnan([all_void["class_miou"], all_void["pixel_accuracy"]]).all()


def test_empty_masks_agree(scores):
    figures = scores([[[0, 0]]], [[[0, 0]]])
    assert figures["foreground_iou"] == 1
    assert np.isnan(figures["class_miou"])  # no class to average
    assert scores([[[1]]], [[[1]]])["foreground_iou"] == 1  # one pixel


def test_segmentation_without_background_has_class_figures_alone(scores):
    figures = scores([[[0, 1]]], [[[0, 0]]], Palette(("sky", "sea")))
    assert figures == {"class_miou": 0.5, "pixel_accuracy": 0.5}  # the sea is absent from the truth


@pytest.mark.parametrize("background_rows", [0, 2])
def test_class_miou_chance_level(background_rows):
    codec = Palette(("nothing", *"abcd"), background=0)
    ids = np.random.default_rng(0).integers(1, 5, (60, 1, 1)) * np.ones((1, 4, 4), int)  # one class an image
    ids[:, :background_rows] = 0  # neither permuted nor averaged
    images = np.stack([codec.render(x) for x in ids])
    (chance,) = Segmentation().chance(codec, images, images)["class_miou"].values()
    assert chance.value == pytest.approx(1 / 7, abs=0.02)  # accuracy 1/4, so IoU 1/(4 + 4 − 1)


def test_segmentation_of_perfect_answers(make_context, make_heldout_scenes, knows):
    scenes = make_heldout_scenes(5, palette=CLASSES)
    codecs = {"rgb": Image(), "segmentation": CLASSES}
    figures, _ = Segmentation(num_queries=8).run(make_context(scenes, codecs, knows(scenes, "segmentation")))
    assert [figure.name for figure in figures] == [
        "foreground_iou", "foreground_miou", "class_miou", "pixel_accuracy", "psnr",
    ]  # fmt: skip
    for figure in figures[:4]:
        assert figure.estimate.value == 1.0
        assert 0 <= figure.baselines["all foreground"].value < 1
        assert 0 < figure.baselines["copied example"].value < 1
    foreground = np.mean([scene.images[:, 1].any(-1) for scene in scenes])
    assert figures[0].baselines["all foreground"].value == pytest.approx(foreground, abs=0.1)
    assert 0 < figures[2].baselines["the same shapes, classes shuffled"].value < 1


def test_sweep_plots_foreground_and_classes(make_context, make_heldout_scenes):
    scenes = make_heldout_scenes(5, palette=CLASSES)
    # Answers that are the query's own codes are wrong, and by these metrics differently so.
    context = make_context(scenes, {"rgb": Image(), "segmentation": CLASSES})
    figures, (_, plot) = Segmentation(num_queries=6, shots=2, sweep=(1,)).run(context)
    values = {figure.name: figure.estimate.value for figure in figures}
    assert values["foreground_iou"] != values["class_miou"]
    assert list(plot.content.series) == ["foreground_iou", "class_miou"]
    for name, points in plot.content.series.items():
        assert [point[0] for point in points] == [1, 2]
        assert points[1][1] == values[name]


def test_segmentation_needs_a_palette(make_context, make_heldout_scenes):
    context = make_context(make_heldout_scenes(4), {"rgb": Image(), "segmentation": Image()})
    with pytest.raises(NotApplicableError, match="the stream segmentation is of kind 'image'"):
        Segmentation().run(context)
