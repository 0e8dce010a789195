"""Segmentation by a rule that changes from prompt to prompt: queries, truths and baselines are by the prompt's rule."""

import dataclasses

import numpy as np
import pytest

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.streams.codecs import Image, Palette
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.evaluators.varying_segmentation import VaryingSegmentation
from tests.lvm.conftest import encode

CLASSES = Palette(("nothing", "cat", "dog"), background=0)
SWAPPED = Palette(("nothing", "dog", "cat"), background=0)
CODECS = {"rgb": Image(), "segmentation": CLASSES, "second": SWAPPED}


@pytest.fixture
def scenes(make_heldout_scenes):
    """Scenes whose "second" is their segmentation with the colors of the two classes exchanged."""
    made = []
    for scene in make_heldout_scenes(5, streams=("rgb", "segmentation", "second"), palette=CLASSES):
        images = scene.images.copy()
        for image in images:
            image[2] = CLASSES.render(np.array([0, 2, 1], np.uint8)[CLASSES.parse(image[1])])
        made.append(dataclasses.replace(scene, images=images, codes=encode(images)))
    return made


def task(**options):
    return VaryingSegmentation(**{"num_queries": 8, "targets": ("segmentation", "second"), "shots": 1} | options)


def test_answers_by_the_rule_of_the_examples_are_right(make_context, scenes):
    """The answering model knows both truths, and which one is asked for from the example alone."""
    streams = ("segmentation", "second")
    frames = [(scene, frame) for scene in scenes for frame in range(len(scene.images))]
    truths = {(x.grid(t, "rgb").tobytes(), name): x.grid(t, name) for x, t in frames for name in streams}

    def answer(grid):
        example, shown, query = (np.asarray(x).tobytes() for x in grid)
        (rule,) = [name for name in streams if truths[example, name].tobytes() == shown]
        return truths[query, rule]

    context = make_context(scenes, CODECS, answer)
    _, pictures = task(sweep=(1, 2)).run(make_context(scenes, CODECS, lambda grid: answer(grid[-3:])))
    assert pictures[1].content.series.keys() == {"class_miou"}
    figures, _ = task().run(context)
    assert figures[0].name == "class_miou"
    assert {figure.name: figure.estimate.value for figure in figures[:4]} == {
        "class_miou": 1, "foreground_iou": 1, "foreground_miou": 1, "pixel_accuracy": 1,
    }  # fmt: skip
    assert [episode.get("shown") for episode in context.episodes] == [None, "second"] * 4
    assert 0 < figures[0].baselines["copied example"].value < 1


def test_answers_by_one_rule_are_wrong_for_the_other(make_context, scenes, knows):
    figures, _ = task().run(make_context(scenes, CODECS, knows(scenes, "segmentation")))
    by_name = {figure.name: figure.estimate.value for figure in figures}
    assert by_name["foreground_iou"] == 1
    assert 0.2 < by_name["class_miou"] < 0.5  # half of the queries are answered in the colors of the others


def test_neighbors_answer_by_the_rule_of_the_prompt(make_context, scenes, monkeypatch):
    """A neighbor that is the query's own frame is right in every palette."""

    def nearest(context, queries, source, target):
        assert {query.shown or "segmentation" for query in queries} == {target}
        # Under the name of the first stream, a query has what is shown.
        return np.stack([query.scene.image(query.frame, "segmentation") for query in queries])

    monkeypatch.setattr("lvm.evaluation.baselines.nearest_neighbor", nearest)
    figures, _ = task().run(make_context(scenes, CODECS))
    assert figures[0].baselines["nearest training neighbor"].value == 1
    monkeypatch.setattr("lvm.evaluation.baselines.nearest_neighbor", lambda *_: None)
    figures, _ = task().run(make_context(scenes, CODECS))
    assert "nearest training neighbor" not in figures[0].baselines


def test_mean_image_is_of_answers_by_the_rule_of_the_prompt(make_context, scenes):
    """Every frame of a rule has the same annotation here, so that their mean is right, and that of all is not."""
    color = {"segmentation": CLASSES.render(np.full((4, 4), 1)), "second": CLASSES.render(np.full((4, 4), 2))}
    for scene in scenes:
        for column, stream in ((1, "segmentation"), (2, "second")):
            scene.images[:, column] = color[stream]
    figures, _ = task().run(make_context(scenes, CODECS))
    assert figures[0].baselines["mean image"].value == 1


def test_foreground_miou_is_summed_by_stream(make_context, scenes):
    queries = task().queries(make_context(scenes, CODECS))
    counts = task().score(CLASSES, *(np.stack([q.scene.image(q.frame, "segmentation") for q in queries]),) * 2, queries)
    assert counts["foreground_miou"].any(-1).sum(0).tolist() == [4, 4]


def test_sheet_shows_each_rule_under_its_name(make_context, scenes, monkeypatch):
    labels = []

    def render(rows):
        labels.extend([cell.label for cell in row] for row in rows)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("lvm.evaluation.prompted.render_sheet", render)
    task().run(make_context(scenes, CODECS))
    assert labels == [["rgb", stream, "query", "answer", "truth"] for stream in ("segmentation", "second")]


def test_prompts_of_another_stream_are_asked_anew(make_context, scenes):
    context = make_context(scenes, CODECS)
    for asked in (Segmentation(num_queries=8, shots=1), task(), task()):
        asked.run(context)
    assert context.model.num_prompts == 16


def test_targets_can_be_overridden_in_a_config():
    values = to_json(task())
    assert "target" not in values
    assert from_config_dict(VaryingSegmentation, values | {"targets": ("a", "b")}).target == "a"


def test_masks_of_one_class_have_no_chance_level():
    masks = np.stack([CLASSES.render(np.ones((4, 4), int))])
    assert Segmentation().chance(Palette(("nothing", "cat"), background=0), masks, masks) == {}


@pytest.mark.parametrize(
    ("targets", "codecs", "message"),
    [
        (("segmentation", "second"), {"second": Image()}, "second is not a palette of the same colors as segmentation"),
        (("segmentation", "second"), {"second": Palette(("nothing", "cat"), 0)}, "second is not a palette of the same"),
        (("segmentation", "second"), {"segmentation": Image()}, "segmentation is of kind 'image'"),
        (("segmentation", "third"), {}, "no held-out scene has the streams rgb and segmentation and third"),
        (("third", "segmentation"), {}, "no held-out scene has the streams rgb and third and segmentation"),
    ],
)
def test_varying_segmentation_needs_palettes(make_context, scenes, targets, codecs, message):
    with pytest.raises(NotApplicableError, match=message):
        task(targets=targets).run(make_context(scenes, CODECS | codecs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("second",)}, "two streams or more"),
        ({"targets": ("second", "second")}, "each once"),
        ({"targets": "segmentation"}, "must be a tuple"),
        ({"targets": ("segmentation", "rgb")}, "without 'rgb'"),
    ],
)
def test_impossible_fields_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        task(**options)
