import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.errors import UserError
from lvm.generate import Sampling, generate_tokens, sample
from lvm.model import ModelConfig, Transformer
from lvm.module import abstract, init_params, merge

CONFIG = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary_size=40, context=48,
    dtype="float32", init_std=0.3,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    make = lambda rngs: Transformer(CONFIG, rngs)  # noqa: E731
    return abstract(make)[0], init_params(make, jax.random.key(0))


def recompute(model, prompt, length, allowed=40):
    """Greedy continuation that runs the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(length):
        row = jnp.array([tokens])
        logits = merge(*model)(row, jnp.arange(len(tokens))[None], "xla")[0, -1, :allowed]
        tokens.append(int(jnp.argmax(logits)))
    return tokens[len(prompt) :]


def test_the_cache_equals_recomputing_at_every_length_and_in_unequal_batches(model):
    prompts = [np.arange(3), np.arange(17) % 11, np.array([5])]
    together = generate_tokens(*model, prompts, 20, GREEDY, [0, 0, 0])
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer[0].tolist() == recompute(model, prompt, 20)
        alone = generate_tokens(*model, [prompt], 20, GREEDY, [0])
        np.testing.assert_array_equal(alone[0], answer)


def test_only_allowed_ids_are_drawn(model):
    prompt = [np.arange(5)]
    free = generate_tokens(*model, prompt, 30, Sampling(temperature=3.0), [0])
    masked = generate_tokens(*model, prompt, 30, Sampling(temperature=3.0), [0], num_allowed=10)
    assert free.max() >= 10
    assert masked.max() < 10


def test_a_row_depends_on_its_own_seed_alone(model):
    prompts = [np.arange(4), np.arange(6), np.arange(4)]
    warm = Sampling(temperature=1.0, top_p=0.95)
    rows = generate_tokens(*model, prompts, 12, warm, [7, 8, 9], candidates=2)
    alone = generate_tokens(*model, prompts[:1], 12, warm, [7], candidates=2)
    np.testing.assert_array_equal(rows[0], alone[0])
    assert (rows[0] != rows[2]).any()  # another seed
    assert (rows[0, 0] != rows[0, 1]).any()  # another candidate


def test_prompt_and_answer_must_fit_the_context(model):
    assert generate_tokens(*model, [np.arange(40) % 9], 9, GREEDY, [0]).shape == (1, 1, 9)
    with pytest.raises(UserError, match="need a context of 49; the model has 48"):
        generate_tokens(*model, [np.arange(40) % 9], 10, GREEDY, [0])
    with pytest.raises(UserError, match="a prompt is empty"):
        generate_tokens(*model, [np.arange(0)], 3, GREEDY, [0])


def draws(logits, sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: sample(logits, key, sampling))(keys))


LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))


def test_sampling_follows_the_softmax():
    shares = np.bincount(draws(LOGITS, Sampling()), minlength=5) / 4000
    np.testing.assert_allclose(shares, np.exp(LOGITS), atol=0.03)


def test_temperature_sharpens():
    shares = np.bincount(draws(LOGITS, Sampling(temperature=0.5)), minlength=5) / 4000
    wanted = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(shares, wanted, atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    assert set(draws(LOGITS, Sampling(top_k=2))) == {0, 1}
    # 0.5 + 0.25 reach 0.7: the third token would lie wholly beyond it.
    assert set(draws(LOGITS, Sampling(top_p=0.7))) == {0, 1}
    assert set(draws(LOGITS, Sampling(top_p=0.8))) == {0, 1, 2}
    assert set(draws(LOGITS, Sampling(temperature=0.0), 10)) == {0}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
