"""Generation with a KV cache against full forward passes."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference.generator import Generator, SamplingParams, SlidingWindow
from lvm.model.nnx_utils import abstract_module, init_params, merge
from lvm.model.transformer import ModelConfig, Transformer

V, CODES, N, BOS, CONTEXT = (
    40,
    32,
    6,
    32,
    33,
)  # 5 grids of 6 codes fit after BOS, and 2 more tokens
CONFIG = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary_size=V, context=CONTEXT,
    dtype="float32", init_std=0.3,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)
WINDOW = SlidingWindow(N, BOS)


def make(rngs):
    return Transformer(CONFIG, rngs)


@functools.cache
def params():
    return init_params(make, jax.random.key(0))


@functools.cache
def generator(mesh=None):
    return Generator(CONFIG, params(), None if mesh is None else make_mesh(mesh))


@functools.cache
def whole_forward():
    graphdef = abstract_module(make)[0]
    positions = jnp.arange(64)[None]
    return jax.jit(lambda row: merge(graphdef, params())(row, positions, "xla")[0])


def logits(tokens):
    """Logits of the token after the last, by one forward pass over all of them."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(whole_forward()(row)[len(tokens) - 1])


def generate(prompts, num_tokens, sampling, seeds, mesh=None, **options):
    """Two candidates per prompt and codes alone, so that most tests run the same programs."""
    options = {"candidates": 2, "num_allowed": CODES, **options}
    return generator(mesh)(prompts, num_tokens, sampling, seeds, **options)


def check_greedy(prompt, answer, window=None):
    """Compares with full forwards over the window, up to a tie, where the two may diverge."""
    tokens = list(prompt)
    for token in answer.tolist():
        if window is not None and len(tokens) == 1 + 5 * N:
            tokens = [BOS, *tokens[1 + window.drop * N :]]
        scores = logits(tokens)[:CODES]
        second, best = np.sort(scores)[-2:]
        if token != int(np.argmax(scores)):
            assert best - second < 1e-4
            return
        tokens.append(token)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, length).astype(np.int32)


def grids(count, seed=0):
    return np.append(BOS, prompt(count * N, seed)).astype(np.int32)


def test_decode_matches_full_forward_in_unequal_batches():
    prompts = [prompt(1), prompt(13)]
    batched = generate(prompts, 20, GREEDY, [0, 0])
    for row, answer in zip(prompts, batched, strict=True):
        check_greedy(row, answer[0])
        np.testing.assert_array_equal(answer[0], answer[1])
    alone = generate(prompts[1:], 20, GREEDY, [0], candidates=1)
    np.testing.assert_array_equal(alone[0, 0], batched[1, 0])


@pytest.mark.parametrize("drop", [1, 2, 4])
def test_re_prefill_matches_full_forward_of_the_window(drop):
    window = SlidingWindow(N, BOS, drop)
    prompts = [grids(1), grids(4, seed=1)]
    answers = generate(prompts, 7 * N, GREEDY, [0, 0], window=window)
    for row, answer in zip(prompts, answers, strict=True):
        check_greedy(row, answer[0], window)
    alone = generate(prompts[1:], 7 * N, GREEDY, [0], window=window, candidates=1)
    np.testing.assert_array_equal(alone[0, 0], answers[1, 0])


def test_re_prefill_has_slots_for_rows_of_any_length():
    """The longer row slides when the shorter one has just outgrown their initial padded length."""
    config = dataclasses.replace(CONFIG, context=185, num_layers=1)
    one_layer = Generator(config, init_params(lambda rngs: Transformer(config, rngs), jax.random.key(0)))
    options = {"num_allowed": CODES, "window": SlidingWindow(16, BOS, 8)}
    prompts = [np.append(BOS, prompt(count * 16, seed=count)).astype(np.int32) for count in (7, 5)]
    batched = one_layer(prompts, 82, GREEDY, [0, 0], **options)
    alone = one_layer(prompts[1:], 82, GREEDY, [0], **options)
    np.testing.assert_array_equal(alone[0], batched[1])


def test_window_drops_half_of_the_grids_by_default():
    half, default, one = (
        generate([grids(4)], 3 * N, GREEDY, [0], window=SlidingWindow(N, BOS, drop)) for drop in (2, 0, 1)
    )
    np.testing.assert_array_equal(half, default)
    np.testing.assert_array_equal(one[..., :N], default[..., :N])
    assert (one != default).any()


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=4, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["all axes", "data", "tensor"],
)
def test_eight_devices_match_one(mesh):
    prompts, params_by_row = [grids(1), grids(3, seed=1)], [GREEDY, SamplingParams(1.0, top_p=0.9)]
    one, eight = (
        generate(prompts, 5 * N, params_by_row, [1, 2], window=WINDOW, mesh=devices) for devices in (None, mesh)
    )
    np.testing.assert_array_equal(one, eight)


@given(st.data())
@settings(max_examples=4)
def test_rows_are_independent_of_the_batch(data):
    requests = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2**40)), min_size=2, max_size=2))
    prompts = [grids(count, seed=count) for count, _ in requests]
    params_by_row = [SamplingParams(1.0, top_k=9), SamplingParams(0.8, top_p=0.95)]
    seeds = [seed for _, seed in requests]
    batched = generate(prompts, 3 * N, params_by_row, seeds, window=WINDOW)
    for i in range(2):
        alone = generate(prompts[i : i + 1], 3 * N, params_by_row[i], seeds[i : i + 1], window=WINDOW)
        np.testing.assert_array_equal(alone[0], batched[i])


def test_seeds_and_candidates_differ():
    rows = generate([prompt(4), prompt(4)], 18, SamplingParams(), [7, 8])
    assert (rows[0] != rows[1]).any()
    assert (rows[0, 0] != rows[0, 1]).any()


def test_stream_yields_prefixes_of_the_answer():
    options = {"num_allowed": CODES, "window": WINDOW, "candidates": 2}
    whole = generator()([grids(4)], 2 * N, SamplingParams(), [3], **options)
    parts = list(generator().stream([grids(4)], 2 * N, SamplingParams(), [3], **options, every=4))
    assert [part.shape[-1] for part in parts] == [4, 6, 10, 12]  # the window slides after 6
    for part in parts:
        np.testing.assert_array_equal(part, whole[..., : part.shape[-1]])


def test_only_allowed_ids_are_sampled():
    hot = SamplingParams(temperature=5.0)
    assert generate([prompt(5)], 20, hot, [0]).max() >= 10
    assert generate([prompt(5)], 20, hot, [0], num_allowed=10).max() < 10


def test_first_codes_follow_the_softmax():
    """χ² test of 2000 candidates' first codes against the model's probabilities; rare codes are pooled."""
    ids = generator()([grids(2)], 1, SamplingParams(), [0], candidates=2000, num_allowed=CODES)[0, :, 0]
    scores = logits(grids(2))[:CODES].astype(np.float64)
    probs = np.exp(scores - scores.max())
    assert chi_square(ids, probs / probs.sum()) < 0.999


def chi_square(ids, probs):
    """Cumulative probability of the χ² statistic of sampled ids."""
    from scipy import stats

    expected, counts = probs * len(ids), np.bincount(ids, minlength=len(probs))
    frequent = expected >= 5
    cells = [
        *zip(counts[frequent], expected[frequent], strict=True),
        (counts[~frequent].sum(), expected[~frequent].sum()),
    ]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells if mean > 0)
    return stats.chi2.cdf(statistic, len([mean for _, mean in cells if mean > 0]) - 1)


def test_bfloat16_generates_codes():
    half = Generator(ModelConfig(**{**vars(CONFIG), "dtype": "bfloat16"}), params())
    answer = half([grids(2)], 2 * N, GREEDY, [0], num_allowed=CODES)
    assert answer.shape == (1, 1, 2 * N)
    assert answer.max() < CODES


def test_candidates_share_one_prefill(monkeypatch):
    from lvm.inference import decode

    shapes = collections.Counter()
    prefill = decode.prefill
    monkeypatch.setattr(
        decode,
        "prefill",
        lambda params, rows, *a, **k: shapes.update([rows.shape]) or prefill(params, rows, *a, **k),
    )
    assert generate([prompt(4)], 18, SamplingParams(), [7]).shape == (1, 2, 18)
    assert shapes == {(1, 128): 1}


def test_without_window_the_context_is_the_limit():
    assert generate([prompt(14)], 20, GREEDY, [0]).shape == (1, 2, 20)
    with pytest.raises(UserError, match="need a context of 34; the model has 33"):
        generate([prompt(14)], 21, GREEDY, [0])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([prompt(0)], {}, "a prompt is empty"),
        ([], {}, "no prompts"),
        ([prompt(3)], {"num_tokens": 0}, "num_tokens=0"),
        ([prompt(3)], {"seeds": [1, 2]}, "1 prompts, 1 sampling params, 2 seeds"),
        ([grids(5)], {"window": WINDOW}, "a prompt of 31 tokens and 6 new ones need a context of 36"),
        (
            [grids(1)],
            {"window": SlidingWindow(N, BOS, 5)},
            "drop=5 must be from 1 to 4",
        ),
    ],
)
def test_stream_rejects_invalid_requests(prompts, options, words):
    with pytest.raises(UserError, match=words):
        generator()(prompts, **{"num_tokens": 4, "sampling": GREEDY, "seeds": [0] * len(prompts), **options})
