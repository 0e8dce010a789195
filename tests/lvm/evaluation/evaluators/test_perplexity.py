"""Perplexity in both averages, by images in context and by position."""

import dataclasses

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.mixture.split import group_hash
from lvm.data.store.reader import Store
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.perplexity import Perplexity
from lvm.evaluation.figures import estimate

LOSSES = np.log(np.array([[[2.0, 8.0], [1.0, 1.0]], [[16.0, 16.0], [4.0, 4.0]]]))  # [2, 2, 2]


def run(make_context, recipe, losses, groups=None):
    context = make_context([], {}, mixture=MixtureConfig({"a": ComponentConfig(recipe)}))
    context.cache["losses", 128, "None"] = {"a": losses}
    groups = np.repeat(np.arange(len(losses))[:, None], losses.shape[1], axis=1) if groups is None else groups
    context.sentence_cache[128, "None"] = {"a": (np.zeros(losses.shape, int), np.array(groups, np.uint64))}
    figures, pictures = Perplexity().run(context)
    return {figure.name: figure.estimate for figure in figures}, [picture.content.series["a"] for picture in pictures]


def test_perplexity_by_image_in_both_averages(make_context):
    figures, (exp_of_mean, mean_of_exp, by_position) = run(make_context, Video(frames=2, strides=(1,)), LOSSES)
    assert [point[:2] for point in exp_of_mean] == [(0, pytest.approx(8)), (1, pytest.approx(2))]  # √(4·16), √(1·4)
    assert [point[:2] for point in mean_of_exp] == [(0, pytest.approx(10)), (1, pytest.approx(2.5))]
    assert figures["exp_of_mean/a"].value == pytest.approx(2)  # of the second image, the answer
    assert figures["mean_of_exp/a"].value == pytest.approx(2.5)
    assert by_position == [(1, pytest.approx(np.log(2))), (2, pytest.approx(np.log(2)))]


def test_intervals_are_over_originals(make_context):
    """Sentences of one video are no independent samples."""
    losses, recipe = np.random.default_rng(0).random((12, 2, 3)), Video(frames=2, strides=(1,))
    once, (by_image, *_) = run(make_context, recipe, losses)
    groups = np.repeat(np.arange(12), 10)[:, None].repeat(2, axis=1)
    often, (by_image_often, *_) = run(make_context, recipe, losses.repeat(10, axis=0), groups)
    for name in ("exp_of_mean/a", "mean_of_exp/a"):
        assert often[name].interval == pytest.approx(once[name].interval)
    np.testing.assert_allclose(by_image_often, by_image)
    assert len(by_image[0]) == 4  # with a band
    assert run(make_context, recipe, losses, groups[:12])[0]["exp_of_mean/a"].interval is None


def test_images_of_a_sentence_are_of_their_own_originals(make_context):
    """Query and example change roles: each original has one loss, in whichever sentence it is."""
    by_original = np.random.default_rng(1).random(12)
    groups = np.array([np.random.default_rng(i).permutation(12)[:2].repeat(2) for i in range(200)])
    losses = by_original[groups][:, :, None].repeat(3, axis=2)
    figures, (by_image, *_) = run(make_context, Pairs(shots=2), losses, groups)
    expected = estimate(np.repeat(by_original, 5), np.exp, np.repeat(np.arange(12), 5))
    assert np.diff(figures["exp_of_mean/a"].interval) == pytest.approx(np.diff(expected.interval), rel=0.1)
    widths = [point[3] - point[2] for point in by_image]
    assert widths == pytest.approx([float(np.diff(expected.interval)[0])] * 2, rel=0.2)
    assert figures["mean_of_exp/a"].interval is None


def test_perplexity_of_pairs_is_that_of_answers(make_context):
    losses = np.broadcast_to(np.log(np.array([5.0, 2.0, 7.0, 3.0]))[:, None], (3, 4, 2))
    figures, (exp_of_mean, *_) = run(make_context, Pairs(shots=2), losses)
    assert [point[:2] for point in exp_of_mean] == [(1, pytest.approx(2)), (3, pytest.approx(3))]
    assert figures["exp_of_mean/a"].value == pytest.approx(np.sqrt(6))


def test_perplexity_of_single_images_ignores_the_first_code(make_context):
    losses = LOSSES[:, :1].copy()
    losses[:, 0, 0] = np.nan  # without BOS nothing predicts it
    figures, (exp_of_mean, *_) = run(make_context, Single(), losses)
    assert figures["exp_of_mean/a"].value == pytest.approx(np.sqrt(8 * 16))
    assert exp_of_mean[0][:2] == (0, pytest.approx(np.sqrt(8 * 16)))


def test_perplexity_without_sentences_is_not_applicable(make_context):
    context = make_context([], {})
    context.cache["losses", 128, "None"] = {}
    with pytest.raises(NotApplicableError, match="no component"):
        Perplexity().run(context)


def stored(make_context, path, fraction):
    data = MixtureConfig({"v": ComponentConfig(Video(frames=2, strides=(1,)))}, (path,), heldout_fraction=fraction)
    return make_context([], {}), data


def test_sentences_are_those_of_a_store(make_context, make_store):
    context, data = stored(make_context, make_store([(3, 0)] * 6), 0.0)
    sentences = context.sentences(4, data)["v"]
    assert sentences.shape == (4, 2, 4)
    scenes = [scene.codes[:, 0] for scene in map(Store(data.store[0]).scene, range(6))]
    (scene,) = [n for n, codes in enumerate(scenes) for i in range(2) if np.array_equal(sentences[0], codes[i : i + 2])]
    groups = context.sentence_groups(4, data)["v"]
    assert groups[0].tolist() == [group_hash(f"group {scene}")] * 2
    assert len(np.unique(groups)) == 4


def test_sentences_reject_a_training_store_and_other_codes(make_context, make_store):
    context, data = stored(make_context, make_store([(3, 0)] * 6), 0.0)
    context.model.record["stores"] = [Store(data.store[0]).identity()]
    with pytest.raises(UserError, match="the model was trained on it; heldout_fraction"):
        context.sentences(4, data)
    tuned = make_store([(3, 0)] * 6, name="tuned", weights="c" * 64, codes="d")
    context.tokenizer = dataclasses.replace(context.tokenizer, identity={"hash": "a" * 64, "codes": "d"})
    assert context.sentences(4, MixtureConfig(data.components, (tuned,), heldout_fraction=0.0))
    other = make_store([(3, 0)] * 6, name="other", weights="b" * 64)
    with pytest.raises(UserError, match="codes of tokenizer bbbbbbbbbbbb"):
        context.sentences(4, MixtureConfig(data.components, (other,), heldout_fraction=0.0))
