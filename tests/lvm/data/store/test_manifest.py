"""The manifest: names of all shards merged, kinds of scenes and held-out scenes without a look at any index."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture.split import heldout_mask
from lvm.data.store import failures, manifest, writer
from lvm.data.store.format import Scene
from lvm.data.store.reader import Store
from lvm.data.streams.codecs import Edges, Image

HEADER = {"tokenizer": {"weights": "", "hash": "", "grid": [1, 2], "num_codes": 16}, "streams": {}}
CODECS = {"rgb": Image().to_json(), "edges": Edges().to_json()}


def scene(i, class_name="", streams=("rgb",), frames=1, group=None):
    codes = np.full((frames, len(streams), 2), i % 16, np.uint16)
    return Scene(f"scene {i}", class_name, streams, codes, 2**63 + i if group is None else group)


def write(folder, *shards, codecs=CODECS, header=HEADER):
    writer.begin_store(folder, header, len(shards))
    for number, scenes in enumerate(shards):
        writer.write_shard(folder, number, len(shards), scenes, 16, codecs=codecs)
    assert writer.finish_store(folder) == []
    return Store(folder)


def test_names_of_shards_are_merged_and_ids_translated(tmp_path):
    shards = (
        [scene(0, "dog"), scene(1, "ape", ("rgb", "edges"), 2)],
        [],
        [scene(2, "cat", ("rgb", "edges")), scene(3), scene(4, "dog", frames=3)],
    )
    store = write(tmp_path, *shards)
    assert store.classes == ["ape", "cat", "dog"]
    assert store.stream_sets == [("rgb",), ("rgb", "edges")]
    assert store.manifest["images_by_stream"] == {"rgb": 8, "edges": 3}
    assert store.index["class_id"].tolist() == [2, 0, 1, -1, 2]
    assert store.index["stream_set"].tolist() == [0, 1, 1, 0, 0]
    entries = store.entries(np.arange(5)[::-1])
    np.testing.assert_array_equal(entries["class_id"], store.index["class_id"][::-1])
    np.testing.assert_array_equal(entries["stream_set"], store.index["stream_set"][::-1])
    assert [store.scene(i).class_name for i in range(5)] == ["dog", "ape", "cat", "", "dog"]
    np.testing.assert_array_equal(store.grids(store.entries(np.array([2])), np.array([0]), np.array([1])), [[2, 2]])


def test_codecs_of_shards_are_merged(tmp_path):
    writer.begin_store(tmp_path, HEADER, 2)
    writer.write_shard(tmp_path, 0, 2, [scene(0)], 16, codecs={"rgb": CODECS["rgb"]})
    writer.write_shard(tmp_path, 1, 2, [scene(1, streams=("edges", "rgb"))], 16, codecs=CODECS)
    assert writer.finish_store(tmp_path) == []
    assert Store(tmp_path).streams == {"rgb": Image(), "edges": Edges()}


def test_different_codecs_of_a_stream_name_both_shards(tmp_path):
    writer.begin_store(tmp_path, HEADER, 3)
    for shard, codec in enumerate((Image(), Image(), Edges())):
        writer.write_shard(tmp_path, shard, 3, [scene(shard)], 16, codecs={"rgb": codec.to_json()})
    with pytest.raises(UserError, match=r"shard-00000-of-00003 and shard-00002-of-00003 .* stream 'rgb'"):
        writer.finish_store(tmp_path)


def test_stream_without_a_codec_is_named(tmp_path):
    with pytest.raises(UserError, match=r"stream 'edges' has a codec neither in header\.json nor in an entry"):
        write(tmp_path, [scene(0, streams=("rgb", "edges"))], codecs={"rgb": CODECS["rgb"]})


kinds = st.tuples(st.sampled_from(["", "cat", "dog"]), st.sampled_from([("rgb",), ("edges", "rgb")]), st.integers(1, 3))


@settings(max_examples=20)
@given(st.lists(st.lists(st.tuples(kinds, st.integers(1, 5)), max_size=6), min_size=1, max_size=3).filter(any))
def test_runs_tell_what_the_index_tells(tmp_path_factory, runs_of_shards):
    shards = [[scene(0, *kind) for kind, count in runs for _ in range(count)] for runs in runs_of_shards]
    store = write(tmp_path_factory.mktemp("store"), *shards)
    starts = np.cumsum([0, *map(len, shards)])
    first = starts[store.runs["shard"]] + store.runs["first_scene"]
    run = np.searchsorted(first, np.arange(len(store)), side="right") - 1
    for field in ("class_id", "frames", "stream_set"):
        np.testing.assert_array_equal(store.runs[field][run], store.index[field])


def test_shard_of_many_kinds_has_no_runs(tmp_path):
    mixed = [scene(i, frames=1 + i % 2) for i in range(manifest.MAX_RUNS + 1)]
    store = write(tmp_path, mixed, mixed[:-1])
    assert set(store.runs["shard"].tolist()) == {1}
    assert len(store.runs) == manifest.MAX_RUNS


@settings(max_examples=30)
@given(st.data())
def test_listed_scenes_are_those_of_any_small_share(tmp_path_factory, data):
    limit = int(manifest.LISTED_SHARE * 2**64)
    group = st.one_of(st.integers(0, 2 * limit), st.integers(0, 2**64 - 1))
    groups = data.draw(st.lists(group, min_size=2, max_size=20, unique=data.draw(st.booleans())))
    if len(set(groups)) == 1:
        groups[0] ^= 1
    cut = data.draw(st.integers(0, len(groups)))
    scenes = [scene(i, group=group) for i, group in enumerate(groups)]
    store = write(tmp_path_factory.mktemp("store"), scenes[:cut], scenes[cut:])
    share = data.draw(st.floats(0, manifest.LISTED_SHARE))
    mask = heldout_mask(store.heldout["group"], share, store.group_hashes)
    expected = heldout_mask(store.index["group"], share, store.group_hashes)
    assert sorted(store.heldout["scene"][mask].tolist()) == np.flatnonzero(expected).tolist()
    assert (np.diff(store.heldout["group"].astype(object)) >= 0).all()


@pytest.mark.parametrize("name", ["manifest.index", "manifest.heldout"])
def test_damaged_table_is_named_with_the_remedy(tmp_path, name):
    write(tmp_path, [scene(0), scene(1)])
    file = tmp_path / name
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}: damaged; .* --finish --out={tmp_path}"):
            Store(tmp_path).heldout  # noqa: B018 (reads it)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; .* --finish"):
        Store(tmp_path).heldout  # noqa: B018
    assert writer.finish_store(tmp_path) == []
    assert (file.read_bytes(), len(Store(tmp_path).heldout)) == (content, 1)


def test_entry_of_another_size_of_file_is_missing(tmp_path):
    write(tmp_path, [scene(0)], [scene(1)])
    file = tmp_path / "shard-00001-of-00002.codes"
    file.write_bytes(file.read_bytes()[:-1])
    assert writer.missing_shards(tmp_path, 2) == []
    assert writer.finish_store(tmp_path) == ["shard-00001-of-00002"]
    assert writer.missing_among(tmp_path, range(2), 2) == [1]
    file.unlink()
    assert writer.missing_shards(tmp_path, 2) == ["shard-00001-of-00002"]


def test_reasons_are_counted_without_names_and_numbers():
    reasons = [f"frame {i}: cut off after {i * 1000:,} bytes" for i in range(9)]
    reasons += [f"a/b{i}.jpg: not 'JPEG {i}'" for i in range(3)] + ["<_io.BytesIO object at 0x7f3a>: empty"]
    assert failures.count([{"key": "", "reason": reason} for reason in reasons]) == {
        "frame #: cut off after # bytes": 9,
        "… not …": 3,
        "<_io.BytesIO object at #>: empty": 1,
    }


def test_number_of_reasons_is_bounded(tmp_path):
    reasons = [f"cause {chr(65 + i // 26)}{chr(65 + i % 26)}" for i in range(200)]
    writer.begin_store(tmp_path, HEADER, 2)
    for shard in range(2):
        listed = [{"key": f"{i}", "reason": reason} for i, reason in enumerate([*reasons, reasons[7]])]
        writer.write_shard(tmp_path, shard, 2, [scene(shard)], 16, writer.SkippedItems(listed), codecs=CODECS)
    assert writer.finish_store(tmp_path) == []
    counts = Store(tmp_path).manifest["failures"]
    assert len(counts) == 33
    assert (counts["cause AH"], sum(counts.values())) == (4, 402)
    assert len(list(failures.read(tmp_path))) == 402
    assert files.file_size(tmp_path / "manifest.json") < 4000


def test_failures_of_an_earlier_attempt_are_removed(tmp_path):
    writer.begin_store(tmp_path, HEADER, 1)
    skipped = writer.SkippedItems([{"key": "0", "reason": "disk"}])
    writer.write_shard(tmp_path, 0, 1, [scene(0)], 16, skipped, codecs=CODECS)
    writer.write_shard(tmp_path, 0, 1, [scene(0)], 16, codecs=CODECS)
    assert writer.finish_store(tmp_path) == []
    assert Store(tmp_path).manifest["failures"] == {}
    assert list(failures.read(tmp_path)) == []


def test_store_without_scenes_is_refused(tmp_path):
    writer.begin_store(tmp_path, HEADER, 2)
    for shard in range(2):
        skipped = writer.SkippedItems([{"key": f"{shard}.tar", "reason": "it is compressed"}], [])
        writer.write_shard(tmp_path, shard, 2, [], 16, skipped)
    with pytest.raises(UserError, match=r"found no usable scene in the source \(0\.tar: it is compressed\)"):
        writer.finish_store(tmp_path)
    assert not (tmp_path / manifest.MANIFEST).exists()


def test_store_begun_without_a_hash_of_codes_is_continued(tmp_path):
    """As by versions that had none; the tokenizer must be the same all the same."""
    writer.begin_store(tmp_path, HEADER, 2)
    tokenizer = HEADER["tokenizer"] | {"codes": "c"}
    writer.begin_store(tmp_path, HEADER | {"tokenizer": tokenizer}, 2)
    with pytest.raises(UserError, match=r"changed: tokenizer\.hash"):
        writer.begin_store(tmp_path, HEADER | {"tokenizer": tokenizer | {"hash": "d"}}, 2)


@pytest.mark.parametrize(
    ("tokenizer", "other", "equal"),
    [
        ({"hash": "a"}, {"hash": "a"}, True),
        ({"hash": "a"}, {"hash": "b"}, False),
        ({"hash": "a", "codes": "c"}, {"hash": "b", "codes": "c"}, True),
        ({"hash": "a", "codes": "c"}, {"hash": "a", "codes": "d"}, False),
        ({"hash": "a", "codes": "c"}, {"hash": "a"}, True),
        ({"hash": "a", "codes": "c"}, {"hash": "b"}, False),
        ({"hash": "a", "codes": ""}, {"hash": "b", "codes": ""}, False),
    ],
)
def test_same_codes(tokenizer, other, equal):
    assert manifest.same_codes(tokenizer, other) == manifest.same_codes(other, tokenizer) == equal
