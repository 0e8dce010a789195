"""Concatenated rows are cuts of the stream of sentences, with random access."""

import itertools
import time

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.mixture.rows import Rows, to_tokens
from lvm.model.vocabulary import Vocabulary

OURS = Vocabulary.for_codes(16)
BARE = Vocabulary(16, 32, bos=None, eos=None, pad=16)
COMPONENTS = {
    "pairs": ComponentConfig(Pairs(shots=2), 0.5),
    "single": ComponentConfig(Single(), 1.0),
    "video": ComponentConfig(Video(frames=3, strides=(1,)), 1.5),
}


@pytest.fixture
def make_rows(make_store):
    path = make_store([(1, 0)] * 6 + [(4, 0)] * 5 + [(1, 1)] * 5)

    def make(vocabulary=OURS, context=24, batch_size=3, seed=0):
        return Rows(Mixture(MixtureConfig(COMPONENTS, (path,), 0.0), seed), vocabulary, context, batch_size)

    return make


def read_row(rows, index):
    """Tokens [C+1] of a row, and the component of each target [C]."""
    batch = Rows(rows.mixture, rows.vocabulary, rows.context, 1).batch(index)
    return batch["tokens"][0], batch["component_ids"][0]


def naive_stream(mixture, vocabulary, blocks):
    """All tokens of the first blocks with their components, sentence after sentence."""
    tokens, components = [], []
    for block in range(blocks):
        for component, index in zip(*mixture.block(block), strict=True):
            sentence = mixture.components[component].sentence(int(index)).ravel().tolist()
            specials = vocabulary.bos is not None
            sentence = [vocabulary.bos] * specials + sentence + [vocabulary.eos] * specials
            tokens += sentence
            components += [component] * len(sentence)
    return np.array(tokens), np.array(components)


def test_to_tokens_adds_specials_of_the_vocabulary():
    codes = np.array([[1, 2], [3, 4]])
    assert to_tokens(codes, OURS).tolist() == [16, 1, 2, 3, 4, 17]
    assert to_tokens(codes, BARE).tolist() == [1, 2, 3, 4]
    assert to_tokens(codes, OURS).dtype == np.int32


@pytest.mark.parametrize("vocabulary", [OURS, BARE], ids=["ours", "bare"])
def test_rows_are_cuts_of_the_stream(make_rows, vocabulary):
    stream, components = naive_stream(make_rows(vocabulary).mixture, vocabulary, blocks=3)
    for context in (1, 7, 24, 1000):
        rows, last = make_rows(vocabulary, context), (len(stream) - 1) // context - 1
        for index in {0, 1, 2, last // 3, last // 2, last - 1, last}:
            tokens, ids = read_row(rows, index)
            np.testing.assert_array_equal(tokens, stream[index * context :][: context + 1])
            np.testing.assert_array_equal(ids, components[index * context + 1 :][:context])


def test_consecutive_rows_share_one_token(make_rows):
    rows = make_rows(context=24)
    stream, _ = naive_stream(rows.mixture, OURS, blocks=1)
    tokens = [read_row(rows, index)[0] for index in range(len(stream) // 24)]
    for one, following in itertools.pairwise(tokens):
        assert one[-1] == following[0]
    inputs = np.concatenate([one[:-1] for one in tokens])
    np.testing.assert_array_equal(inputs, stream[: len(inputs)])


def test_batch_matches_its_spec_and_its_rows(make_rows):
    rows = make_rows(batch_size=3)
    for step in (0, 5):
        batch = rows.batch(step)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in rows.batch_spec.items()
        }
        for i in range(3):
            np.testing.assert_array_equal(batch["tokens"][i], read_row(rows, 3 * step + i)[0])
        np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(24), (3, 1)))
        assert batch["loss_mask"].all()


def test_component_ids_are_of_the_targets(make_rows):
    rows = make_rows(batch_size=5)
    stream, components = naive_stream(rows.mixture, OURS, blocks=1)
    batch = rows.batch(0)
    np.testing.assert_array_equal(batch["tokens"][:, 1:].ravel(), stream[1 : 5 * 24 + 1])
    np.testing.assert_array_equal(batch["component_ids"].ravel(), components[1 : 5 * 24 + 1])


@pytest.mark.parametrize("step", [0, 1, 12345])
def test_batch_is_a_function_of_its_step(make_rows, step):
    used = make_rows()
    for other in (3, 99, 4):
        used.batch(other)
    for name, values in make_rows().batch(step).items():
        np.testing.assert_array_equal(used.batch(step)[name], values)
    assert not np.array_equal(used.batch(step)["tokens"], make_rows(seed=1).batch(step)["tokens"])


def test_rows_do_not_depend_on_batch_size(make_rows):
    two, three = make_rows(batch_size=2), make_rows(batch_size=3)
    by_two = np.concatenate([two.batch(step)["tokens"] for step in range(3)])
    by_three = np.concatenate([three.batch(step)["tokens"] for step in range(2)])
    np.testing.assert_array_equal(by_two, by_three)


def test_batch_of_a_distant_step_is_fast(make_rows):
    rows = make_rows()
    start = time.process_time()
    batch = rows.batch(10**9)
    assert time.process_time() - start < 1
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() <= OURS.eos
    assert OURS.bos in batch["tokens"]


def test_batch_size_0_raises(make_rows):
    with pytest.raises(UserError, match=r"config\.batch_size=0"):
        make_rows(batch_size=0)
