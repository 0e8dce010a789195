"""Video continuation by frame, against true frames."""

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Video
from lvm.data.streams.codecs import Image
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.video import VideoContinuation


def context(make_context, make_heldout_scenes, recipe, frames=6, **options):
    scenes = make_heldout_scenes(3, streams=("rgb",), frames=frames)
    return make_context(scenes, {"rgb": Image()}, mixture=MixtureConfig({"clips": ComponentConfig(recipe)}), **options)


def test_video_of_a_model_that_repeats_the_last_frame(make_context, make_heldout_scenes):
    given = context(make_context, make_heldout_scenes, Video(frames=4, strides=(1, 2)), batch_size=2)
    figures, (plot, sheet) = VideoContinuation(num_queries=5).run(given)
    psnr = {figure.name: figure for figure in figures}["psnr"]
    assert psnr.estimate.value == psnr.baselines["last frame"].value
    assert psnr.estimate.value < psnr.baselines["mean of the prompt"].value < psnr.ceiling.value
    assert psnr.ceiling.value == pytest.approx(100)
    assert [point[0] for point in plot.content.series["model"]] == [3, 4]
    assert "first 2 frames" in sheet.text
    assert [episode[2] for episode in given.episodes] == [1] * 5  # the smallest stride


def test_video_prompt_is_the_true_frames(make_context, make_heldout_scenes):
    prompts = []
    answer = lambda grid: prompts.append(grid) or grid[0]  # noqa: E731
    given = context(make_context, make_heldout_scenes, Video(frames=3, strides=(2,)), answer=answer)
    VideoContinuation(prompt=2, num_queries=3).run(given)
    for prompt, scene, (_, start, stride) in zip(prompts, given.heldout.scenes, given.episodes, strict=True):
        np.testing.assert_array_equal(prompt, scene.codes[[start, start + stride], 0])


def test_video_settings_are_checked(make_context, make_heldout_scenes):
    given = context(make_context, make_heldout_scenes, Video(frames=3, strides=(1,)))
    with pytest.raises(UserError, match="component='nothing' must be one of clips"):
        VideoContinuation(component="nothing").run(given)
    with pytest.raises(UserError, match="prompt=3 must be below the 3 frames"):
        VideoContinuation(prompt=3).run(given)
    short = context(make_context, make_heldout_scenes, Video(frames=3, strides=(9,)))
    with pytest.raises(NotApplicableError, match="no held-out video of rgb has 19 frames"):
        VideoContinuation().run(short)
    with pytest.raises(NotApplicableError, match="no videos"):
        VideoContinuation().run(context(make_context, make_heldout_scenes, Pairs()))
