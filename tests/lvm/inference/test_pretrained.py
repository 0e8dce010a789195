"""`LVM` over random parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference.generator import SamplingParams
from lvm.inference.pretrained import LVM
from lvm.model.nnx_utils import init_params
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import Vocabulary

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


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, fsdp=2), MeshConfig(data=2, sequence=2, tensor=2)])
def test_losses_and_logits_on_several_devices(model, mesh):
    sharded = LVM(model.config, VOCABULARY, model._params, {}, 0, make_mesh(mesh))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (5, 20))  # the mesh divides neither
    for name in ("token_losses", "logits"):
        expected = getattr(model, name)(tokens)
        np.testing.assert_allclose(getattr(sharded, name)(tokens), expected, rtol=1e-4, atol=1e-4)


def test_with_params_takes_other_weights(model):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (1, 20))
    before = model.token_losses(tokens)
    other = model.with_params(jax.tree.map(lambda x: x * 0, model._params), 7)
    assert other.step == 7
    np.testing.assert_allclose(other.token_losses(tokens), np.log(VOCABULARY.size), rtol=1e-5)
    assert (other.generate(tokens[:, :4][None] % 32, 1, temperature=0.0) == 0).all()
    np.testing.assert_array_equal(model.token_losses(tokens), before)


def test_wide_heads_get_a_kernel_that_runs(monkeypatch):
    """On a GPU cuDNN takes heads of up to 128; here it fails at any size."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = ModelConfig(320, 32, 1, 2, vocabulary_size=VOCABULARY.size, context=16, dtype="bfloat16")
    wide = LVM(config, VOCABULARY, init_params(lambda rngs: Transformer(config, rngs), jax.random.key(0)), {}, 0)
    tokens = np.zeros((1, 4), int)
    assert np.isfinite(wide.logits(tokens)).all()
    assert wide.generate_tokens(tokens, 2).shape == (1, 2)


def test_repr_has_sizes(model):
    assert repr(model) == (
        "<LVM: 36,000 parameters, 2 layers of 32, context 300, 32 codes of 288 ids, float32, step 0>"
    )


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
        ({"grids": [grids[0], np.zeros((18, 16), int)]}, "a prompt of 18 images"),
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


def prompts(num_prompts=2, images=2):
    return np.random.default_rng(0).integers(0, 32, (num_prompts, images, 16), np.int32)


def test_generate_prepends_bos_if_the_vocabulary_has_one(model):
    grids = prompts()
    flat = grids.reshape(2, -1)
    greedy = SamplingParams(temperature=0)
    plain = model.generate_tokens(flat, 16, greedy, codes_only=True)
    with_bos = model.generate_tokens(np.insert(flat, 0, VOCABULARY.bos, 1), 16, greedy, codes_only=True)
    assert (plain != with_bos).any()
    np.testing.assert_array_equal(model.generate(grids, 1, temperature=0)[:, 0], with_bos)
    bare = LVM(model.config, dataclasses.replace(VOCABULARY, bos=None), model._params, {}, 0)
    np.testing.assert_array_equal(bare.generate(grids, 1, temperature=0)[:, 0], plain)


def test_generate_depends_on_the_seed_of_each_prompt(model):
    same = np.repeat(prompts(1), 2, axis=0)
    answers = model.generate(same, 1, seed=[1, 2])
    assert (answers[0] != answers[1]).any()
    np.testing.assert_array_equal(model.generate(same, 1, seed=[2, 1]), answers[::-1])
    np.testing.assert_array_equal(model.generate(same, 1, seed=1), answers[[0, 0]])
    assert (model.generate(same[:1], 1) != model.generate(same[:1], 1, seed=1)).any()
    np.testing.assert_array_equal(model.generate(same[:1], 1, seed=0), model.generate(same[:1], 1))


def test_generate_tokens_depends_on_the_seed_of_each_row(model):
    rows = np.repeat(prompts(1).reshape(1, -1), 2, axis=0)
    answers = model.generate_tokens(rows, 8, seed=[1, 2])
    assert (answers[0] != answers[1]).any()
    np.testing.assert_array_equal(model.generate_tokens(rows, 8, seed=[2, 1]), answers[::-1])


def test_generate_passes_each_prompt_its_sampling(model):
    same = np.repeat(prompts(1), 4, axis=0)
    settings = {"temperature": [0, 1, 1, 1], "top_k": [0, 1, 0, 0], "top_p": [1.0, 1.0, 1e-6, 1.0]}
    answers = model.generate(same, 1, seed=3, **settings)
    np.testing.assert_array_equal(answers[1:3], answers[[0, 0]])  # the most likely code alone, by three settings
    assert (answers[3] != answers[0]).any()
    assert model.generate(same[:1], 1, candidates=2, seed=3).shape == (1, 2, 1, 16)


def test_generate_drops_images_when_the_context_is_full(model):
    grids = prompts(1, images=17)  # with BOS and an answer of one image the context is full
    answers = [model.generate(grids, 2, temperature=0, drop=drop)[0] for drop in (0, 1, 9)]
    np.testing.assert_array_equal(answers[0], answers[2])  # half of the 18 images
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    *_, streamed = model.stream(grids, 2, 1, SamplingParams(temperature=0), 0, 1)
    np.testing.assert_array_equal(streamed[0, 0], answers[1].ravel())
    kept = np.concatenate([grids[:, 1:], answers[1][None, :1]], axis=1)
    np.testing.assert_array_equal(model.generate(kept, 1, temperature=0)[0, 0], answers[1][1])


def test_stream_yields_after_every_few_codes(model):
    parts = list(model.stream(prompts(1), 2, 1, SamplingParams(temperature=0), every=5))
    assert [part.shape[-1] for part in parts] == [5, 10, 15, 20, 25, 30, 32]
    for part in parts:
        np.testing.assert_array_equal(part, parts[-1][..., : part.shape[-1]])
