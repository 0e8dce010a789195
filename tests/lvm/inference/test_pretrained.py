"""`LVM` over random parameters."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from lvm.common.errors import UserError
from lvm.inference.pretrained import LVM
from lvm.model.nnx_utils import init_params
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("compiled_quickly")

VOCABULARY = Vocabulary.for_codes(32)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, vocabulary_size=VOCABULARY.size, context=300,
        dtype="float32", init_std=0.3,
    )  # fmt: skip
    params = init_params(lambda rngs: Transformer(config, rngs), jax.random.key(0))
    return LVM(config, VOCABULARY, params, {}, 0)


def test_token_losses_match_logits(model):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (2, 301))  # more than one chunk
    log_probs = log_softmax(model.logits(tokens[:, :-1]).astype(np.float64), -1)
    expected = -np.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(model.token_losses(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros((1, 4), np.float32), "tokens: float32"),
        ([[1, 2], [3]], "tokens: rows of unequal length"),
        (np.zeros((1, 0), int), "not empty"),
        ([[VOCABULARY.size]], "tokens: ids from"),
        (np.zeros((1, 301), int), "context of 300"),
    ],
)
def test_logits_reject_invalid_tokens(model, tokens, words):
    with pytest.raises(UserError, match=words):
        model.logits(tokens)


def test_generate_rejects_invalid_requests(model):
    grids = np.zeros((2, 1, 16), int)
    for arguments, words in [
        ({"seed": [1, 2, 3]}, "seed has 3 values for 2 prompts"),
        ({"candidates": 0}, "candidates=0"),
        ({"num_images": 0}, "num_images=0"),
        ({"grids": [grids[0], grids[0, :, :8]]}, r"\[8, 16\] codes per image"),
        ({"grids": grids + 32}, "expected 0..31"),
        ({"grids": np.zeros((1, 18, 16), int)}, "holds 18 images"),
    ]:
        with pytest.raises(UserError, match=words):
            model.generate(**{"grids": grids, "num_images": 1, **arguments})


def test_generate_shapes_with_and_without_candidates(model):
    grids = np.zeros((2, 1, 16), int)
    assert model.generate(grids, 2, temperature=0).shape == (2, 2, 16)
    assert model.generate([grids[0], grids[1]], 1, candidates=3, seed=[1, 2], top_p=0.9).shape == (
        2,
        3,
        1,
        16,
    )
