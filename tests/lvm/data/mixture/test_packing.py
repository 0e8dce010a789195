"""Whole packing holds every sentence once; loss masks of both packings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import BLOCK, PERIOD, ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.packing import best_fit
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.mixture.rows import Rows
from lvm.model.vocabulary import Vocabulary

OURS = Vocabulary.for_codes(16)
COMPONENTS = {
    "pairs": ComponentConfig(Pairs(shots=2), 0.5),
    "single": ComponentConfig(Single(), 1.0),
    "video": ComponentConfig(Video(frames=3, strides=(1,)), 1.5),
}


@pytest.fixture
def make_rows(make_store):
    path = make_store([(1, 0)] * 6 + [(4, 0)] * 5 + [(1, 1)] * 5)

    def make(components=COMPONENTS, context=24, batch_size=3, seed=0, vocabulary=OURS, packing="whole", **options):
        config = MixtureConfig(components, (path,), 0.0, packing=packing, **options)
        return Rows(Mixture(config, seed), vocabulary, context, batch_size)

    return make


def segments_of(batch):
    """(tokens, component) of every sentence in a batch, row after row."""
    sentences = []
    columns = batch["tokens"], batch["segment_ids"], batch["component_ids"]
    for tokens, segments, components in zip(*columns, strict=True):
        for segment in range(1, segments.max() + 1):
            (inside,) = np.nonzero(segments == segment)
            end = inside[-1] + 1
            last = end == len(segments) and components[-1] >= 0  # the last target has no segment id
            sentences.append((tokens[inside[0] : end + last], int(components[inside[0]])))
    return sentences


def test_whole_packs_every_sentence_of_a_block_once(make_rows):
    rows = make_rows(batch_size=1)
    count = next(row for row in range(10**6) if rows.packer.block_of_row(row) == 1)
    packed = [sentence for row in range(count) for sentence in segments_of(rows.batch(row))]
    ids, indices = rows.mixture.block(0)
    expected = [
        [OURS.bos, *rows.mixture.components[component].sentence(int(index)).ravel(), OURS.eos]
        for component, index in zip(ids, indices, strict=True)
    ]
    assert sorted(tokens.tolist() for tokens, _ in packed) == sorted(expected)
    assert len(packed) == BLOCK
    assert np.bincount([component for _, component in packed]).tolist() == np.bincount(ids).tolist()


def test_whole_restarts_positions_and_masks_first_tokens(make_rows):
    batch = make_rows(batch_size=40).batch(2)
    tokens, segments, mask = batch["tokens"], batch["segment_ids"], batch["loss_mask"]
    positions = batch["positions"]
    starts = (tokens[:, :-1] == OURS.bos) & (segments > 0)
    assert starts[:, 0].all()
    assert (positions[starts] == 0).all()
    continued = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert (np.diff(positions, axis=1)[continued] == 1).all()
    assert (positions[segments == 0] == 0).all()
    targets = tokens[:, 1:]
    np.testing.assert_array_equal(mask, (targets != OURS.bos) & (targets != OURS.pad))
    assert (segments == 0).any()
    assert (batch["component_ids"][targets == OURS.pad] == -1).all()
    assert (tokens[:, :-1][segments == 0] == OURS.pad).all()


def test_summary_counts_rows_of_an_epoch_and_none_is_lost(make_rows):
    for packing in ("concat", "whole"):
        rows = make_rows({"single": COMPONENTS["single"]}, packing=packing, batch_size=1)
        component = rows.mixture.components[0]
        stream = np.concatenate(
            [
                [OURS.bos, *component.sentence(int(n)).ravel(), OURS.eos]
                for n in sorted(rows.mixture.block(0)[1][: component.sentences_per_epoch])
            ]
        )
        assert rows.summary() == [
            f"single: {component.sentences_per_epoch} sentences an epoch, by themselves "
            + (
                f"{(len(stream) - 1) // 24} rows and {(len(stream) - 1) % 24} tokens"
                if packing == "concat"
                else f"{component.sentences_per_epoch // 4} rows of 4 and {component.sentences_per_epoch % 4} sentences"
            )
        ]
        if packing == "concat":
            _, indices = rows.mixture.block(0)
            full = (len(stream) - 1) // 24
            targets = np.concatenate([rows.batch(row)["tokens"][0, 1:] for row in range(full)])
            flat = np.concatenate([[OURS.bos, *component.sentence(int(n)).ravel(), OURS.eos] for n in indices])
            np.testing.assert_array_equal(targets, flat[1 : full * 24 + 1])


def test_first_block_has_the_first_sentences(make_rows):
    rows = make_rows({"single": COMPONENTS["single"]}, batch_size=1)
    _, indices = rows.mixture.block(0)
    assert sorted(indices.tolist()) == list(range(BLOCK))


@pytest.mark.parametrize("context", [13, 14, 200])
def test_whole_sentence_may_fill_a_row(make_rows, context):
    rows = make_rows({"video": COMPONENTS["video"]}, context=context, batch_size=8)
    batch = rows.batch(0)
    if context == 13:  # BOS, 12 codes, EOS
        assert (batch["tokens"][:, 0] == OURS.bos).all()
        assert (batch["tokens"][:, -1] == OURS.eos).all()
        assert batch["loss_mask"].all()
    assert OURS.eos in batch["tokens"]
    assert "lose their EOS" not in rows.summary()[0]


def test_one_token_too_many_drops_only_the_eos(make_rows):
    rows = make_rows({"video": COMPONENTS["video"]}, context=12, batch_size=8)
    batch = rows.batch(0)
    assert (batch["tokens"][:, 0] == OURS.bos).all()
    assert (batch["tokens"][:, 1:] < 16).all()
    assert batch["loss_mask"].all()
    assert "all 5 lose their EOS: they have 14 tokens, a row 13" in rows.summary()[0]


def test_sentence_longer_than_a_row_raises(make_rows):
    with pytest.raises(UserError, match=r"components\.video: .*\(video, 3 grids\) has 14 tokens, .* 13;"):
        make_rows({"video": COMPONENTS["video"]}, context=11)


def test_vocabulary_without_eos_or_pad(make_rows):
    bare = Vocabulary(16, 32, bos=None, eos=None, pad=16)
    assert make_rows({"video": COMPONENTS["video"]}, context=11, vocabulary=bare).sentence_lengths.tolist() == [12]
    with pytest.raises(UserError, match=r"has 12 tokens, .* 11;"):
        make_rows({"video": COMPONENTS["video"]}, context=10, vocabulary=bare)
    with pytest.raises(UserError, match=r"config\.data\.packing='whole' .*PAD"):
        make_rows(vocabulary=Vocabulary(16, 32, None, None, None))


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_loss_on_answers_masks_everything_else(make_rows, packing):
    components = {name: COMPONENTS[name] for name in ("pairs", "video")}
    rows = make_rows(components, packing=packing, loss="answers", batch_size=30)
    batch = rows.batch(0)
    everything = make_rows(components, packing=packing, batch_size=30).batch(0)
    np.testing.assert_array_equal(batch["tokens"], everything["tokens"])
    assert (batch["loss_mask"] <= everything["loss_mask"]).all()
    assert (batch["tokens"][:, 1:][batch["loss_mask"]] < 16).all()
    if packing == "whole":
        for component, learned in (
            (0, [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0]),
            (1, [0] * 4 + [1] * 8 + [0]),
        ):
            row, start = next(
                zip(
                    *np.nonzero((batch["positions"] == 0) & (batch["component_ids"] == component)),
                    strict=True,
                )
            )
            assert batch["loss_mask"][row, start : start + len(learned)].tolist() == [bool(x) for x in learned]


def test_loss_on_answers_requires_answers(make_rows):
    with pytest.raises(UserError, match=r"config\.data\.loss='answers' .* single "):
        make_rows(loss="answers")


@pytest.mark.parametrize("packing", ["concat", "whole"])
@given(data=st.data())
def test_batch_reads_only_the_requested_rows(make_rows_once, packing, data):
    rows = make_rows_once(packing)
    selected = data.draw(st.lists(st.integers(0, 8), max_size=9, unique=True))
    batch, part = rows.batch(4), rows.batch(4, np.array(selected, np.int64))
    for name, values in part.items():
        np.testing.assert_array_equal(values, batch[name][selected])
        assert values.dtype == rows.batch_spec[name].dtype


@pytest.fixture(scope="session")
def make_rows_once(tmp_path_factory):
    """`make_rows` with results that hypothesis shares between examples."""
    cache = {}

    def make(packing):
        if packing not in cache:
            from lvm.data.store import writer
            from tests.lvm.conftest import NUM_CODES, header, make_scenes

            folder = tmp_path_factory.mktemp(packing)
            scenes = make_scenes([(1, 0)] * 6 + [(4, 0)] * 5 + [(1, 1)] * 5)
            writer.write_shard(folder, 0, 1, scenes, NUM_CODES)
            assert not writer.write_manifest(folder, header(), 1)
            config = MixtureConfig(COMPONENTS, (str(folder),), 0.0, packing=packing)
            cache[packing] = Rows(Mixture(config, 0), OURS, 24, 9)
        return cache[packing]

    return make


def test_batch_row_out_of_range_raises(make_rows):
    with pytest.raises(ValueError, match="rows 3…3 are not in a batch of 3"):
        make_rows().batch(0, np.array([3]))


def test_whole_row_counts_repeat_after_the_period(make_rows):
    rows = make_rows()
    period = rows.packer._count_rows(2**62)[-1]
    assert rows.packer.block_of_row(period) == PERIOD
    assert rows.packer.block_of_row(period * 5 + 3) == rows.packer.block_of_row(3) + 5 * PERIOD
    np.testing.assert_array_equal(rows.batch(10**12)["tokens"], make_rows().batch(10**12)["tokens"])


def test_block_counts_equal_differences_of_sentences_before(make_rows):
    mixture = make_rows().mixture
    for first in (0, 77_777, PERIOD - 3, PERIOD - 1, 10**9):
        counts = mixture.block_counts(first, first + 3)
        for i in range(3):
            before, after = mixture.sentences_before(first + i), mixture.sentences_before(first + i + 1)
            assert counts[i].tolist() == [b - a for a, b in zip(before, after, strict=True)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=4, unique_by=lambda x: x[1]))
def test_best_fit_packs_every_item_within_capacity(kinds):
    counts, lengths = zip(*kinds, strict=True)
    bins = best_fit(counts, lengths, 30)
    assert [sum(bin.count(kind) for bin in bins) for kind in range(len(kinds))] == list(counts)
    sizes = [sum(lengths[kind] for kind in bin) for bin in bins]
    assert all(0 < size <= 30 for size in sizes)
    total = sum(count * length for count, length in kinds)
    assert len(bins) <= 1 + 2 * total / 30  # no two bins would fit into one


def test_best_fit_takes_the_fullest_bin_that_has_room():
    # Neither the emptiest bin, nor the first or the last, and the first of equally full ones.
    assert best_fit((1, 1, 2, 1), (17, 8, 12, 2), 22) == ((0,), (2, 1, 3), (2,))
