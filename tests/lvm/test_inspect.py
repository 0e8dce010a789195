"""Verification of stores: an intact one passes, any changed byte is reported, in the words of training's errors."""

import itertools
import json
import pathlib
import shutil

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm import inspect
from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.images.augment import Augment
from lvm.data.images.decode_worker import Limits
from lvm.data.images.sources import open_source
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Single, Video
from lvm.data.mixture.rows import SKIPPED, Rows
from lvm.data.store import writer
from lvm.data.store.format import SCENE_DTYPE, DamagedError
from lvm.data.store.reader import Store
from lvm.data.store.verify import check_shards, find_problems
from lvm.model.vocabulary import Vocabulary
from tests.commands import run
from tests.tokenizer.networks import random_weights, small
from tokenizer import Tokenizer, weights
from tokenizer.encoding import Encoder

SHAPES = [(1, 0)] * 70 + [(3, 0), (1, 1)] + [(1, 0)] * 5 + [(2, 2), (1, 0)]


@pytest.fixture(scope="session")
def intact(tmp_path_factory):
    """The path of a store as tokenizer.encode writes it, header included."""
    from tests.lvm.conftest import NUM_CODES, header, make_scenes

    folder = tmp_path_factory.mktemp("stores") / "intact"
    scenes = make_scenes(SHAPES)
    writer.begin_store(folder, header(), 2)
    for shard, shard_scenes in enumerate((scenes[:60], scenes[60:])):
        writer.write_shard(folder, shard, 2, shard_scenes, NUM_CODES)
    assert writer.finish_store(folder) == []
    return folder


@pytest.fixture
def copy(intact, tmp_path):
    return pathlib.Path(shutil.copytree(intact, tmp_path / "copy"))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def problems(folder):
    return list(find_problems(Store(folder)))


def test_intact_store_has_no_problem(intact):
    assert problems(intact) == []


@given(st.data())
def test_any_changed_byte_is_reported(intact, tmp_path_factory, data):
    folder = pathlib.Path(shutil.copytree(intact, tmp_path_factory.mktemp("flip") / "store"))
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    file = folder / data.draw(st.sampled_from(names))
    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    try:
        reported = problems(folder)
    except UserError as error:  # the tables of the manifest are checked as the store is opened
        reported = [str(error)]
    assert any(str(folder) in problem for problem in reported)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("header.json", '"version": 4', '"version": 5'),
        ("shard-00001-of-00002.json", '"bytes": 300', '"bytes": 301'),
        ("shard-00001-of-00002.json", '"bytes": 300', '"butes": 300'),
    ],
)
def test_changed_words_of_side_files_are_reported(copy, name, before, after):
    content = (copy / name).read_text()
    assert content.count(before) == 1
    (copy / name).write_text(content.replace(before, after))
    assert any(f"{copy / name}: damaged" in problem for problem in problems(copy))


def test_damaged_codes_are_reported_as_reading_reports_them(copy):
    file, store = copy / "shard-00000-of-00002.codes", Store(copy)
    flip(file, 12 * 7)  # the eighth grid of four codes
    reported = problems(copy)
    with pytest.raises(DamagedError) as error:
        store.scene(7)
    assert reported[0] == str(error.value)
    assert reported[0] == f"{file}, scene 'scene 7' frame 0: damaged: checksum mismatch"
    assert reported[1:] == [f"{file}: damaged: checksum differs from the manifest's"]


def test_damaged_index_is_reported_as_reading_reports_it(copy):
    file = copy / "shard-00001-of-00002.index"
    flip(file, 4)  # group of the first scene
    with pytest.raises(UserError) as error:
        Store(copy).entries(np.array([60]))
    assert problems(copy) == [str(error.value), f"{file}: damaged: checksum differs from the manifest's"]
    assert str(error.value) == f"{file}: damaged: section scenes: checksum mismatch"


def test_damaged_staged_index_is_reported(copy, tmp_path):
    staged = Store(copy, stage_to=str(tmp_path / "staged"))
    staged.entries(np.arange(len(staged)))
    (file,) = (tmp_path / "staged").rglob("shard-00001-of-00002.index")
    flip(file, 4)
    reported = list(find_problems(Store(copy, stage_to=str(tmp_path / "staged"))))
    assert reported == [f"{file}: damaged: section scenes: checksum mismatch"]


@pytest.mark.parametrize("field", ["frames", "first_grid", "stream_set"])
def test_index_of_other_scenes_is_reported(copy, field):
    name = "shard-00001-of-00002"
    index, entry = copy / f"{name}.index", files.read_json(copy / f"{name}.json")
    scenes = np.frombuffer(index.read_bytes(), SCENE_DTYPE, entry["scenes"]).copy()
    scenes[field][1] += 4
    index.write_bytes(scenes.tobytes() + index.read_bytes()[scenes.nbytes :])
    entry["sections"]["scenes"]["crc32c"] = google_crc32c.value(scenes.tobytes())
    entry["files"][index.name]["sha256"] = files.sha256(index)
    files.write_json(copy / f"{name}.json", entry)
    writer.finish_store(copy)
    expected = "stream set 4" if field == "stream_set" else "the shard's index is damaged"
    assert expected in problems(copy)[0]


def test_missing_file_of_codes_is_reported_once(copy):
    file = copy / "shard-00000-of-00002.codes"
    size = file.stat().st_size
    file.unlink()
    assert problems(copy) == [f"{file}: is missing, the manifest says {size}; encode it again"]


def test_missing_and_truncated_files_are_reported(copy):
    (copy / "shard-00000-of-00002.index").unlink()
    file = copy / "shard-00001-of-00002.codes"
    file.write_bytes(file.read_bytes()[:-100])
    reported = "\n".join(problems(copy))
    assert "shard-00000-of-00002.index: is missing, the manifest says" in reported
    assert f"{file}: has {file.stat().st_size} bytes, the manifest says" in reported


@pytest.mark.parametrize(
    ("key", "value"), [("scenes", 3), ("codes_used", 1), ("images_by_stream", {}), ("classes", ["cow", "dog"])]
)
def test_manifest_unlike_the_shard_entries_is_reported(copy, key, value):
    manifest = files.read_json(copy / "manifest.json")
    files.write_json(copy / "manifest.json", manifest | {key: value})
    assert any(f"{key} differs from header.json" in problem for problem in problems(copy))


def test_wrong_counts_in_a_consistent_store_are_reported(tmp_path, new_scenes, manifest_header):
    writer.begin_store(tmp_path, manifest_header(), 1)
    scenes = new_scenes([(1, 0)] * 5)
    writer.write_shard(tmp_path, 0, 1, [*scenes, scenes[0]], 16)
    entry = files.read_json(tmp_path / "shard-00000-of-00001.json")
    entry |= {"codes_used": "0100", "images_by_stream": {"rgb": 14}}
    files.write_json(tmp_path / "shard-00000-of-00001.json", entry)
    writer.finish_store(tmp_path)
    reported = problems(tmp_path)
    name = tmp_path / "shard-00000-of-00001"
    assert reported == [
        f"{name}: 1 duplicate keys",
        f"{name}: the entry says images_by_stream {{'rgb': 14}}, the shard has {{'rgb': 6}}",
        f"{name}: the entry says codes_used 0100, the shard has fdb7",
    ]


def test_entry_of_another_number_of_scenes_is_reported(copy):
    path = copy / "shard-00000-of-00002.json"
    files.write_json(path, files.read_json(path) | {"scenes": 59})
    writer.finish_store(copy)
    assert problems(copy) == [f"{path.with_suffix('.index')}: damaged: section scenes: 60 items, expected 59"]


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_training_rejects_or_skips_damaged_grids(copy, packing, caplog):
    file = copy / "shard-00000-of-00002.codes"
    vocabulary = Vocabulary.for_codes(16)

    def rows(skip):
        sources = {
            "single": ComponentConfig(Single()),
            "video": ComponentConfig(Video(frames=2, strides=(1,))),
        }
        config = MixtureConfig(sources, (str(copy),), 0.0, packing=packing, skip_damaged=skip)
        return Rows(Mixture(config, 0), vocabulary, 40, 4)

    before = [rows(False).batch(step) for step in range(4)]
    for grid in (0, 9, 20, 27):
        flip(file, 12 * grid)
    with pytest.raises(DamagedError, match=rf"{file}, scene 'scene \d+' frame 0: damaged"):
        [rows(False).batch(step) for step in range(4)]
    skipping = rows(True)
    after = [skipping.batch(step) for step in range(4)]
    assert skipping.skipped.keys() <= set(problems(copy)[:4])
    assert 1 < len(set().union(*skipping.skipped.values())) < 17
    assert caplog.text.count(f"skipped: {next(iter(skipping.skipped))} (1 damaged grids, 1 sentences so far)") == 1
    # A sentence that is cut counts in both batches.
    counts = [int(skipping.counted_batch(step)[SKIPPED].sum()) for step in range(4)]
    num_skipped = len(set().union(*skipping.skipped.values()))
    assert num_skipped <= sum(counts) <= num_skipped + 3
    assert SKIPPED not in after[0]
    lost = 0
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old["component_ids"], new["component_ids"])
        kept = new["loss_mask"]
        assert not (kept & ~old["loss_mask"]).any()
        np.testing.assert_array_equal(new["tokens"][:, 1:][kept], old["tokens"][:, 1:][kept])
        gone = old["loss_mask"] & ~kept
        assert (new["tokens"][:, 1:][gone] == vocabulary.pad).all()
        lost += gone.sum()
    assert lost > 0


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with a tokenizer, the config of a source, and a store of the source encoded by the tokenizer."""
    folder = tmp_path_factory.mktemp("encoded")
    network = small("maskgit", resolution=32, channel_multipliers=(1, 2))
    weights.write(folder / "tokenizer", random_weights(network), "orbax")
    config = "dict(kind='generated', num_scenes=10, num_frames=2)"
    (folder / "scenes.py").write_text(f"def get_config():\n    return {config}\n")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    source = open_source(str(folder / "scenes.py"), tokenizer.preprocess)
    Encoder(tokenizer, source, folder / "store", 2, 8, Augment(0, tokenizer.preprocess), 0, Limits()).run()
    assert writer.finish_store(folder / "store") == []
    return folder


def test_command_prints_verifies_and_writes_a_sheet(encoded, tmp_path, copy):
    store = encoded / "store"
    options = [f"--tokenizer={encoded / 'tokenizer'}", f"--source={encoded / 'scenes.py'}", "--sample=3"]
    output = run("lvm.inspect", store, *options, f"--sheet={tmp_path / 'a.png'}")
    assert "all checksums and counts are right; perplexity of the codes " in output
    assert "10 scenes, 80 images: depth 20, edges 20, rgb 20, segmentation 20" in output
    assert output.endswith("; 3 scenes re-encoded\n")
    assert (tmp_path / "a.png").stat().st_size > 1000
    file = copy / "shard-00000-of-00002.codes"
    flip(file, 0)
    report = json.loads(run("lvm.inspect", copy, "--json", code=1))
    assert report["problems"][0].startswith(f"{file}, scene 'scene 0' frame 0: damaged")
    assert (report["scenes"], report["codes_used"], report["num_shards"]) == (79, 16, 2)


def test_command_verifies_a_share_of_the_shards(copy):
    flip(copy / "shard-00001-of-00002.codes", 0)
    output = run("lvm.inspect", copy, "--share=0.01")
    assert "all checksums and counts are right in 1 of 2 shards; perplexity" in output
    (copy / "manifest.heldout").unlink()
    output = run("lvm.inspect", copy, "--shard=1/2", code=1)
    assert "scene 60" in output
    assert "manifest.heldout" not in output  # which the first process checks
    assert f"{copy / 'manifest.heldout'}" in problems(copy)[0]
    assert "--share=0.0 must be" in run("lvm.inspect", copy, "--share=0", code=2)


def test_workers_report_the_problems_of_one_process(copy):
    for shard, at in ((0, 8), (1, 100)):
        flip(copy / f"shard-0000{shard}-of-00002.codes", at)
    reported = [report.problems for report in check_shards(Store(copy), range(2), 2)]
    assert [*itertools.chain(*reported)] == problems(copy)
    assert all(len(of_shard) == 2 for of_shard in reported)


def test_damaged_list_of_failures_is_reported(tmp_path, new_scenes, manifest_header):
    writer.begin_store(tmp_path, manifest_header(), 1)
    skipped = writer.SkippedItems([{"key": "a.jpg", "reason": "cut off"}])
    writer.write_shard(tmp_path, 0, 1, new_scenes(SHAPES), 16, skipped)
    writer.finish_store(tmp_path)
    assert problems(tmp_path) == []
    (file,) = tmp_path.glob("*.failures.jsonl")
    flip(file, 3)
    assert problems(tmp_path) == [f"{file}: damaged: checksum differs from the manifest's"]


def test_command_rejects_bad_flags(intact, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    run("lvm.inspect", tmp_path, code=1)
    output = run("lvm.inspect", intact, "--sheet=x.png", code=2)
    assert "--tokenizer" in output
    output = run("lvm.inspect", intact, "--sheet=x.txt", "--tokenizer=nowhere", code=2)
    assert "--sheet=x.txt" in output


def test_reencode_reports_differing_codes(encoded, monkeypatch):
    store, tokenizer, source = (
        Store(encoded / "store"),
        Tokenizer.load(encoded / "tokenizer"),
        encoded / "scenes.py",
    )
    assert inspect.reencode(store, str(source), tokenizer, 2) == []
    monkeypatch.setattr(tokenizer, "encode", lambda images, size: np.full((len(images), 256), 5))
    reported = inspect.reencode(store, str(source), tokenizer, 2)
    assert len(reported) == 2
    assert "generated-0-000000: re-encoded, " in reported[0]
    with pytest.raises(UserError, match="is not the source of"):
        inspect.reencode(store, "configs/demo_scenes.py", tokenizer, 2)
