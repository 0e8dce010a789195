"""Likelihoods of a model whose logits are known."""

import numpy as np
import pytest
from scipy.special import log_softmax

from lvm.evaluation import likelihood
from lvm.model.vocabulary import Vocabulary

K = 4  # codes
OURS = Vocabulary.for_codes(K)
BARE = Vocabulary(K, K, None, None, None)


class Bigram:
    """A model whose next code depends on the token before it alone."""

    def __init__(self, vocabulary=OURS, scale=2.0):
        self.vocabulary = vocabulary
        size = vocabulary.size
        self.table = np.random.default_rng(3).normal(0, scale, (size, size)).astype(np.float32)
        self.shapes = set()

    def logits(self, tokens):
        self.shapes.add(tokens.shape)
        return self.table[tokens]


def sentences(count, grids=3, codes=4, seed=0):
    return np.random.default_rng(seed).integers(0, K, (count, grids, codes))


@pytest.mark.parametrize("count", [1, 16, 37])
def test_losses_are_those_of_each_code_given_the_one_before(count):
    model, asked = Bigram(), sentences(count)
    losses = likelihood.grid_losses(model, asked)
    likelihoods = log_softmax(model.table.astype(np.float64), -1)
    flat = asked.reshape(count, -1)
    before = np.concatenate([np.full((count, 1), OURS.bos), flat[:, :-1]], 1)
    np.testing.assert_allclose(losses.reshape(count, -1), -likelihoods[before, flat], rtol=1e-5)
    assert losses.shape == asked.shape
    assert len(model.shapes) == 1  # one shape, one compile


def test_without_bos_the_first_code_has_no_prediction():
    model, asked = Bigram(BARE), sentences(3)
    losses = likelihood.grid_losses(model, asked).reshape(3, -1)
    assert np.isnan(losses[:, 0]).all()
    flat = asked.reshape(3, -1)
    likelihoods = log_softmax(model.table.astype(np.float64), -1)
    np.testing.assert_allclose(losses[:, 1:], -likelihoods[flat[:, :-1], flat[:, 1:]], rtol=1e-5)


def test_an_even_model_loses_the_logarithm_of_its_vocabulary():
    losses = likelihood.grid_losses(Bigram(scale=0.0), sentences(2))
    np.testing.assert_allclose(losses, np.log(OURS.size), rtol=1e-6)


def test_large_logits_do_not_overflow():
    losses = likelihood.grid_losses(Bigram(scale=1e4), sentences(2))
    assert np.isfinite(losses).all()


def test_the_mixture_is_weighted_and_stands_beside_the_unigram_entropy():
    losses = {"a": np.full((2, 1, 4), 0.5), "b": np.full((3, 2, 4), 1.5)}
    codes = {"a": np.zeros((2, 1, 4), int), "b": np.ones((3, 2, 4), int)}
    figures = likelihood.mixture_metrics(losses, codes, {"a": 1.0, "b": 3.0, "unused": 5.0}, K)
    assert figures["loss"] == pytest.approx(0.25 * 0.5 + 0.75 * 1.5)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))  # code 0 has a quarter, however many sentences
    assert figures["unigram_entropy"] == pytest.approx(entropy)
    assert figures["below_unigram"] == pytest.approx(1 - figures["loss"] / entropy)
    assert figures["by_component"] == {"a": 0.5, "b": 1.5}


def test_perplexity_of_each_image_in_both_ways():
    losses = np.log(np.array([[[2.0, 8.0], [1.0, 1.0]], [[16.0, 16.0], [4.0, 4.0]]]))  # [2, 2, 2]
    figures = likelihood.perplexity_by_image(losses)
    np.testing.assert_allclose(figures["exp_of_mean"], [8, 2])  # √(4 · 16), √(1 · 4)
    np.testing.assert_allclose(figures["mean_of_exp"], [10, 2.5])  # (4 + 16) / 2, (1 + 4) / 2


def test_perplexity_leaves_out_the_code_that_has_no_prediction():
    losses = np.log(np.array([[[4.0, 9.0]], [[4.0, 9.0]]]))
    losses[:, 0, 1] = np.nan
    np.testing.assert_allclose(likelihood.perplexity_by_image(losses)["exp_of_mean"], [4])


def test_later_frames_stand_beside_the_entropy_given_the_frame_before():
    # After 1 comes 2, after 2 comes 3 or 0, as often; the first frame tells nothing.
    frames = np.array([[[0, 0], [1, 2], [2, 3]], [[0, 0], [1, 2], [2, 0]]])
    losses = np.full(frames.shape, 2.0)
    losses[:, 2] = 0.5
    figures = likelihood.video_metrics(losses, list(frames), 1, K)
    assert (figures["loss_first_image"], figures["loss_from_image_3"]) == (2.0, 0.5)
    assert figures["conditional_entropy_plug_in"] == pytest.approx(np.log(2) / 2)
    corrected = np.log(2) / 2 + (3 - 2) / (2 * 4)  # three pairs and two codes seen, in four transitions
    assert figures["conditional_entropy"] == pytest.approx(corrected)
    assert figures["below_conditional"] == pytest.approx(1 - 0.5 / corrected)
    assert figures["num_transitions"] == 4
    assert figures["perplexity_ratio"] == pytest.approx(np.exp(-1.5))
