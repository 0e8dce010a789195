"""Task following of answers whose kind is known."""

import dataclasses

import numpy as np
import pytest

from lvm.data.streams.codecs import Image
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.task_following import TaskFollowing

STREAMS = ("rgb", "segmentation", "depth")
CODECS = dict.fromkeys(STREAMS, Image())


@pytest.fixture
def scenes(make_heldout_scenes):
    """Streams have disjoint codes and pixels: those of `rgb` lie in 0..79, and so on."""
    disjoint = []
    for scene in make_heldout_scenes(4, streams=STREAMS, frames=1):
        images = scene.images % 80 + 80 * np.arange(3, dtype=np.uint8)[:, None, None, None]
        disjoint.append(dataclasses.replace(scene, images=images, codes=images.reshape(1, 3, 48).astype(np.int32)))
    return disjoint


def run(make_context, scenes, answer):
    task = TaskFollowing(targets=("segmentation", "depth"), num_queries=4)
    return {figure.name: figure for figure in task.run(make_context(scenes, CODECS, answer))[0]}


def test_task_following_of_known_answers(make_context, scenes):
    stream_of = lambda grid: grid[-2].min() // 80  # noqa: E731 (the stream of the examples' annotations)
    truths = {scene.codes[0, 0].tobytes(): scene.codes[0] for scene in scenes}
    wrong = scenes[0].codes[0, 0].tobytes()

    def answer(grid):
        key = grid[-1].tobytes()
        return grid[-1] if stream_of(grid) == 2 and key != wrong else truths[key][stream_of(grid)]

    figures = run(make_context, scenes, answer)
    for name, share in (("by_codes", 0.625), ("by_codes/segmentation", 1.0), ("by_codes/depth", 0.25)):
        assert figures[name].estimate.value == share
        assert figures[name].baselines["chance level"].value == pytest.approx(1 / 3)
    assert figures["by_pixels"].estimate.value == 0.625
    assert figures["by_codes"].ceiling.value == 1.0


def test_task_following_by_codes_ignores_content(make_context, scenes):
    figures = run(make_context, scenes, lambda grid: grid[-2])  # the right kind, another scene's
    assert figures["by_codes"].estimate.value == 1.0


def test_intervals_are_over_originals(make_context, make_heldout_scenes):
    """Each query has the right kind or not by its scene; ten times as many queries tell no more."""
    scenes = make_heldout_scenes(12, streams=STREAMS, frames=1)
    images = [scene.images % 80 + 80 * np.arange(3, dtype=np.uint8)[:, None, None, None] for scene in scenes]
    scenes = [
        dataclasses.replace(x, images=y, codes=y.reshape(1, 3, 48).astype(np.int32))
        for x, y in zip(scenes, images, strict=True)
    ]
    wrong = {scene.codes[0, 0].tobytes() for scene in scenes[:4]}
    context = make_context(scenes, CODECS, lambda grid: grid[-1] if grid[-1].tobytes() in wrong else grid[-2])
    once, often = (
        {x.name: x for x in TaskFollowing(targets=STREAMS[1:], num_queries=count).run(context)[0]}
        for count in (12, 120)
    )
    for name in ("by_codes", "by_codes/depth"):
        assert often[name].estimate.value == pytest.approx(2 / 3)
        assert often[name].estimate.interval == pytest.approx(once[name].estimate.interval)
    assert often["by_codes"].ceiling.interval == (1.0, 1.0)
    assert np.ptp(often["by_codes"].estimate.interval) > 0.4
    assert "120 queries of 12 originals" in often["by_codes"].text


def test_task_following_needs_two_kinds(make_context, make_heldout_scenes):
    scenes = make_heldout_scenes(4)
    with pytest.raises(NotApplicableError, match="0 kinds of annotation"):
        TaskFollowing().run(make_context(scenes, {"rgb": Image(), "segmentation": Image()}))
    video = [
        dataclasses.replace(scene, info=dataclasses.replace(scene.info, group="one"))
        for scene in make_heldout_scenes(4, streams=STREAMS)
    ]
    task = TaskFollowing(targets=STREAMS[1:], num_queries=4)
    with pytest.raises(
        NotApplicableError, match=r"of one original; a query needs 2 of other originals .* same_original"
    ):
        task.run(make_context(video, CODECS))
    dataclasses.replace(task, same_original=True).run(make_context(video, CODECS))
