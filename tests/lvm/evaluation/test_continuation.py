"""Continued sequences, by image, against true ones."""

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Rotation, Video
from lvm.data.streams.codecs import Image
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.video import VideoContinuation
from lvm.evaluation.evaluators.views import NextViews


def context(make_context, make_heldout_scenes, recipe, frames=6, **options):
    scenes = make_heldout_scenes(3, streams=("rgb",), frames=frames)
    return make_context(scenes, {"rgb": Image()}, mixture=MixtureConfig({"clips": ComponentConfig(recipe)}), **options)


def test_video_of_a_model_that_repeats_the_last_frame(make_context, make_heldout_scenes):
    given = context(make_context, make_heldout_scenes, Video(frames=4, strides=(1, 2)), batch_size=2)
    figures, (plot, *_, sheet) = VideoContinuation(num_queries=5).run(given)
    psnr = {figure.name: figure for figure in figures}["psnr"]
    assert psnr.estimate.value == psnr.baselines["last frame"].value
    assert psnr.estimate.value < psnr.baselines["mean of the prompt"].value < psnr.ceiling.value
    assert psnr.ceiling.value == pytest.approx(100)
    assert [point[0] for point in plot.content.series["model"]] == [3, 4]
    assert "first 2 frames" in sheet.text
    assert all(np.diff(frames).tolist() == [1, 1, 1] for _, frames in given.episodes)  # the smallest stride


def test_prompt_is_the_true_frames(make_context, make_heldout_scenes):
    prompts = []
    answer = lambda grid: prompts.append(grid) or grid[0]  # noqa: E731
    given = context(make_context, make_heldout_scenes, Video(frames=3, strides=(2,)), answer=answer)
    VideoContinuation(prompt=2, num_queries=3).run(given)
    for prompt, scene, (_, frames) in zip(prompts, given.heldout.scenes, given.episodes, strict=True):
        np.testing.assert_array_equal(prompt, scene.codes[frames[:2], 0])


def test_views_go_around_the_object(make_context, make_heldout_scenes):
    given = context(make_context, make_heldout_scenes, Rotation(views=3, step=2))
    figures, pictures = NextViews(num_queries=12, prompt=1).run(given)
    assert [list(np.diff(frames) % 6) for _, frames in given.episodes] == [[2, 2]] * len(given.episodes)
    assert any(frames[-1] < frames[0] for _, frames in given.episodes)  # the first follows the last
    assert figures[0].estimate.value == figures[0].baselines["last view"].value
    assert [picture.title for picture in pictures] == ["Views, PSNR by view", "Views, SSIM by view", "Views, continued"]


def test_repeated_sequences_widen_no_claim(make_context, make_heldout_scenes):
    """Of twelve scenes with one start each, 120 sequences have the interval of twelve."""
    scenes = make_heldout_scenes(12, streams=("rgb",), frames=4)
    mixture = MixtureConfig({"clips": ComponentConfig(Video(frames=4, strides=(1,)))})
    given = make_context(scenes, {"rgb": Image()}, mixture=mixture)
    (once, *_), _ = VideoContinuation(num_queries=12).run(given)
    (often, *_), (by_frame, *_, sheet) = VideoContinuation(num_queries=120).run(given)
    assert often.estimate.value == pytest.approx(once.estimate.value)
    assert often.estimate.interval == pytest.approx(once.estimate.interval)
    assert often.text.endswith("120 sequences of 12 originals")
    assert np.diff(by_frame.content.series["model"][0][2:]) > 0
    assert len(sheet.content) == len(VideoContinuation(num_queries=4).run(given)[1][-1].content)  # four sequences


def test_continuation_has_metrics_of_pixels_by_image(make_context, make_heldout_scenes):
    """LPIPS is given as the mean difference; images below SSIM's window have none."""
    given = context(make_context, make_heldout_scenes, Video(frames=4, strides=(1,)))
    given.lpips = lambda images, truth: np.abs(images.astype(float) - truth).mean((1, 2, 3))
    (psnr, ssim, lpips), (*_, by_lpips, _) = VideoContinuation(num_queries=3).run(given)
    assert [psnr.name, ssim.name, lpips.name] == ["psnr", "ssim", "lpips"]
    assert np.isnan(ssim.estimate.value)
    assert not lpips.higher_is_better
    frames = [given.heldout.scenes[i].images[frames, 0].astype(float) for i, (_, frames) in enumerate(given.episodes)]
    expected = np.mean([[np.abs(x[i] - x[1]).mean() for i in (2, 3)] for x in frames], axis=0)
    assert [point[1] for point in by_lpips.content.series["model"]] == pytest.approx(expected)
    assert lpips.estimate.value == pytest.approx(expected.mean())
    assert lpips.ceiling.value == 0


def test_continuation_settings_are_checked(make_context, make_heldout_scenes):
    given = context(make_context, make_heldout_scenes, Video(frames=3, strides=(1,)))
    with pytest.raises(UserError, match="component='nothing' must be one of clips"):
        VideoContinuation(component="nothing").run(given)
    with pytest.raises(UserError, match="prompt=3 must be below the 3 frames"):
        VideoContinuation(prompt=3).run(given)
    with pytest.raises(NotApplicableError, match="no component of the mixture has a recipe of kind 'rotation'"):
        NextViews().run(given)
    short = context(make_context, make_heldout_scenes, Video(frames=3, strides=(9,)))
    with pytest.raises(NotApplicableError, match="no held-out scene has 19 frames of rgb"):
        VideoContinuation().run(short)
    with pytest.raises(NotApplicableError, match="kind 'video'"):
        VideoContinuation().run(context(make_context, make_heldout_scenes, Pairs()))
    with pytest.raises(NotApplicableError, match="one view"):
        NextViews().run(context(make_context, make_heldout_scenes, Rotation(views=1)))
    long = context(make_context, make_heldout_scenes, Video(frames=17, strides=(1,)), frames=20)
    with pytest.raises(NotApplicableError, match="17 frames exceed the context"):
        VideoContinuation().run(long)
