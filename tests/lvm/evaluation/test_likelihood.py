"""Likelihoods of a model with known logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from lvm.evaluation import likelihood
from lvm.inference.pretrained import LVM
from lvm.model.vocabulary import Vocabulary
from lvm.training import losses

K = 4  # codes
WITH_BOS = Vocabulary.for_codes(K)
WITHOUT_BOS = Vocabulary(K, K, None, None, None)


class Bigram(LVM):
    """A model whose next code depends on the preceding token alone: its projection is the table of logits."""

    def __init__(self, vocabulary=WITH_BOS, scale=2.0):
        self.vocabulary = vocabulary
        size = vocabulary.size
        self.table = np.random.default_rng(3).normal(0, scale, (size, size)).astype(np.float32)
        self.log_probs = log_softmax(self.table.astype(np.float64), -1)
        self.shapes = set()

    def token_losses(self, tokens):
        self.shapes.add(tokens.shape)
        return np.asarray(table_losses(self.table, jnp.asarray(tokens, jnp.int32)))


@jax.jit
def table_losses(table, tokens):
    hidden = jax.nn.one_hot(tokens[:, :-1], len(table))
    return losses.token_losses(hidden, table, tokens[:, 1:], 5)[0]


def random_sentences(count, grids=3, codes=4):
    return np.random.default_rng(0).integers(0, K, (count, grids, codes))


@pytest.mark.parametrize("count", [1, 16, 37])
def test_grid_losses_with_bos(count):
    model, sentences = Bigram(), random_sentences(count)
    nll = likelihood.grid_losses(model, sentences)
    flat = sentences.reshape(count, -1)
    before = np.concatenate([np.full((count, 1), WITH_BOS.bos), flat[:, :-1]], 1)
    np.testing.assert_allclose(nll.reshape(count, -1), -model.log_probs[before, flat], rtol=1e-5, atol=1e-6)
    assert nll.shape == sentences.shape
    assert len(model.shapes) == 1  # one shape, one compilation


def test_grid_losses_without_bos_lack_the_first_code():
    model, sentences = Bigram(WITHOUT_BOS), random_sentences(3)
    nll = likelihood.grid_losses(model, sentences).reshape(3, -1)
    assert np.isnan(nll[:, 0]).all()
    flat = sentences.reshape(3, -1)
    np.testing.assert_allclose(nll[:, 1:], -model.log_probs[flat[:, :-1], flat[:, 1:]], rtol=1e-5, atol=1e-6)


def test_grid_losses_of_a_uniform_model():
    nll = likelihood.grid_losses(Bigram(scale=0.0), random_sentences(2))
    np.testing.assert_allclose(nll, np.log(WITH_BOS.size), rtol=1e-6)


def test_grid_losses_do_not_overflow():
    assert np.isfinite(likelihood.grid_losses(Bigram(scale=1e4), random_sentences(2))).all()


def test_mixture_metrics_are_weighted():
    nll = {"a": np.full((2, 1, 4), 0.5), "b": np.full((3, 2, 4), 1.5)}
    codes = {"a": np.zeros((2, 1, 4), int), "b": np.ones((3, 2, 4), int)}
    metrics = likelihood.mixture_metrics(nll, codes, {"a": 1.0, "b": 3.0, "unused": 5.0}, K)
    assert metrics["loss"] == pytest.approx(0.25 * 0.5 + 0.75 * 1.5)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))  # code 0 has a quarter, however many sentences
    assert metrics["unigram_entropy"] == pytest.approx(entropy)
    assert metrics["below_unigram"] == pytest.approx(1 - metrics["loss"] / entropy)
    assert metrics["by_component"] == {"a": 0.5, "b": 1.5}


def test_video_metrics_of_known_transitions():
    # 1 is followed by 2; 2 by 3 or 0 with equal probability. The first transition isn't counted.
    frames = np.array([[[0, 0], [1, 2], [2, 3]], [[0, 0], [1, 2], [2, 0]]])
    nll = np.full(frames.shape, 2.0)
    nll[:, 2] = 0.5
    metrics = likelihood.video_metrics(nll, list(frames), 1, K)
    assert (metrics["loss_first_image"], metrics["loss_from_image_3"]) == (2.0, 0.5)
    assert metrics["conditional_entropy_plug_in"] == pytest.approx(np.log(2) / 2)
    corrected = np.log(2) / 2 + (3 - 2) / (2 * 4)  # three pairs and two codes seen, in four transitions
    assert metrics["conditional_entropy"] == pytest.approx(corrected)
    assert metrics["below_conditional"] == pytest.approx(1 - 0.5 / corrected)
    assert metrics["num_transitions"] == 4
    assert metrics["perplexity_ratio"] == pytest.approx(np.exp(-1.5))


# Six frames alternate between two codes that are independent of each other: certain two frames on, else a coin flip.
ALTERNATING = [np.array([[first], [second]] * 3) for first in (0, 1) for second in (0, 1)]


def test_video_metrics_count_transitions_at_the_stride():
    nll = np.ones((1, 3, 1))
    apart = likelihood.video_metrics(nll, ALTERNATING, 2, K)
    assert apart["num_transitions"] == 4 * 2  # of the third and fourth frame
    assert apart["conditional_entropy_plug_in"] == pytest.approx(0.0, abs=1e-12)
    next_to = likelihood.video_metrics(nll, ALTERNATING, 1, K)
    assert next_to["num_transitions"] == 4 * 4
    assert next_to["conditional_entropy_plug_in"] == pytest.approx(np.log(2))
