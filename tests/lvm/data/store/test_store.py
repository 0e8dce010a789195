"""Store: round trip, reproducible bytes, checks of damaged and missing files."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture import split
from lvm.data.store import reader, records, writer
from lvm.data.store.format import PAGE_SIZE, DamagedError, Scene
from lvm.data.store.reader import Store
from lvm.data.store.writer import GroupedScene, SkippedItems
from lvm.data.streams.codecs import Image

MIXED = [(1, 0)] * 70 + [(3, 0), (1, 1)] + [(1, 0)] * 5 + [(2, 2), (1, 0)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_store_returns_single_images_and_longer_scenes(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    store = Store(make_store(scenes, num_shards=3))
    assert len(store) == len(scenes)
    by_key = {store.scene(i).key: (store.scene(i), entry) for i, entry in enumerate(store.index)}
    assert len(by_key) == len(scenes)
    for item in scenes:
        scene, entry = by_key[item.scene.key]
        np.testing.assert_array_equal(scene.codes, item.scene.codes)
        assert (scene.class_id, scene.stream_set) == (item.scene.class_id, item.scene.stream_set)
        assert (entry["frames"], entry["stream_set"]) == (len(scene.codes), scene.stream_set)
        assert (entry["class_id"], entry["group"]) == (scene.class_id, split.group_hash(item.group))


def test_only_single_images_share_records(make_store):
    index = Store(make_store(MIXED, num_shards=1)).index
    single = (index["frames"] == 1) & (index["stream_set"] == 0)
    assert np.count_nonzero(single) == 76
    assert np.bincount(index["record"][single]).max() == PAGE_SIZE
    assert len(np.unique(index["record"])) == 2 + 3
    assert index["slot"].max() == PAGE_SIZE - 1


def test_store_has_streams_classes_and_num_codes(make_store):
    store = Store(make_store(MIXED))
    assert store.stream_sets == [("rgb",), ("rgb", "segmentation"), ("edges", "rgb")]
    assert store.streams["segmentation"].names == ("nothing", "thing")
    assert (store.classes, store.codes_per_image, store.num_codes) == (["cat", "dog"], 4, 16)


def test_manifest_counts_scenes_images_and_codes(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    manifest = Store(make_store(scenes)).manifest
    assert sum(entry["scenes"] for entry in manifest["shards"]) == len(MIXED)
    assert sum(entry["images"] for entry in manifest["shards"]) == 76 + 3 + 2 + 4
    counts = np.bincount(np.concatenate([item.scene.codes.ravel() for item in scenes]), minlength=16)
    np.testing.assert_array_equal(manifest["histogram"], counts)
    assert (manifest["scenes"], manifest["images"]) == (len(MIXED), 85)
    assert manifest["images_by_stream"] == {"rgb": 76 + 3 + 1 + 2, "segmentation": 1, "edges": 2}


def test_shard_entry_has_checksums_and_failures(tmp_path, new_scenes):
    skipped = SkippedItems()

    def scenes():
        yield from new_scenes([(1, 0)])
        # Known only once the source has been read.
        skipped.failures.append({"key": "broken", "reason": "cut off"})
        skipped.groups.append(7)

    entry = writer.write_shard(tmp_path, 0, 1, scenes(), 16, skipped, {"jax": "0.10"})
    assert entry["failures"] == [{"key": "broken", "reason": "cut off"}]
    assert entry["group_hashes"] == [7, split.group_hash("group 0")]  # unreadable groups count in the split
    assert entry["versions"] == {"jax": "0.10"}
    assert writer.read_shard_entry(tmp_path, 0, 1) == entry
    for name, file in entry["files"].items():
        assert file == {"bytes": os.path.getsize(tmp_path / name), "sha256": files.sha256(tmp_path / name)}
    next(tmp_path.glob("*.json")).write_bytes(b"\0" * 30)
    assert writer.read_shard_entry(tmp_path, 0, 1) is None


def test_equal_input_gives_equal_bytes(make_store):
    first, second = make_store(MIXED, "first"), make_store(MIXED, "second")
    assert contents(first) == contents(second)
    assert Store(first).identity() == Store(second).identity()


def test_identity_depends_on_every_code(make_store, new_scenes):
    other = new_scenes(MIXED)
    other[0].scene.codes[0, 0, 0] ^= 1
    assert Store(make_store(MIXED, "a")).identity() != Store(make_store(other, "b")).identity()


def test_manifest_is_written_once_all_shards_exist(tmp_path, new_scenes, manifest_header):
    for shard in (2, 0):
        writer.write_shard(tmp_path, shard, 3, new_scenes([(1, 0)], seed=shard), 16)
        assert writer.write_manifest(tmp_path, manifest_header(), 3)
        assert not (tmp_path / reader.MANIFEST).exists()
    writer.write_shard(tmp_path, 1, 3, [], 16)
    assert not writer.write_manifest(tmp_path, manifest_header(), 3)
    before = contents(tmp_path)
    assert not writer.write_manifest(tmp_path, manifest_header(), 3)
    assert contents(tmp_path) == before
    assert [len(Store(tmp_path).scene(i).codes) for i in range(2)] == [1, 1]  # the empty shard is skipped


def test_failed_shard_leaves_no_file(tmp_path, new_scenes):
    def scenes():
        yield from new_scenes([(2, 0), (1, 0)])
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        writer.write_shard(tmp_path, 0, 1, scenes(), 16)
    assert os.listdir(tmp_path) == []
    assert writer.read_shard_entry(tmp_path, 0, 1) is None


def test_store_rejects_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}: .*manifest\.json is missing"):
        Store(tmp_path)


def test_store_rejects_another_version(make_store):
    folder = make_store([(1, 0)])
    manifest = files.read_json(f"{folder}/manifest.json")
    files.write_json(f"{folder}/manifest.json", {**manifest, "version": 1})
    with pytest.raises(UserError, match=r"manifest\.json: version 1, .* version 3"):
        Store(folder)


def test_finish_store_rejects_another_version(tmp_path, new_scenes, manifest_header):
    writer.begin_store(tmp_path, manifest_header(), 1)
    writer.write_shard(tmp_path, 0, 1, new_scenes(MIXED), 16)
    header = files.read_json(tmp_path / "header.json")
    assert header["version"] == reader.VERSION
    del header["version"]  # as versions 1 and 2 wrote it
    files.write_json(tmp_path / "header.json", header)
    with pytest.raises(UserError, match=r"header\.json: version None, .* version 3"):
        writer.finish_store(tmp_path)
    with pytest.raises(UserError, match=r"\(changed: version: None → 3\)"):
        writer.begin_store(tmp_path, manifest_header(), 1)
    assert not (tmp_path / reader.MANIFEST).exists()


@pytest.mark.parametrize("suffix", ["index", "array_record"])
def test_missing_or_truncated_file_is_named_on_read(make_store, suffix):
    folder = make_store(MIXED)
    file = Path(folder) / f"shard-00001-of-00002.{suffix}"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    Store(folder).scene(0)  # in the other shard
    with pytest.raises(UserError, match=rf"{file.name}: has {size - 1} bytes, the manifest says {size}"):
        Store(folder).scene(len(MIXED) - 1)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name}: is missing, the manifest says {size}"):
        Store(folder).scene(len(MIXED) - 1)


def test_opening_a_store_reads_only_the_manifest(make_store):
    folder = make_store(MIXED)
    for file in Path(folder).iterdir():
        if file.name != reader.MANIFEST:
            file.unlink()
    assert len(Store(folder)) == len(MIXED)


def test_damaged_record_is_named_on_read(make_store, new_scenes):
    scenes = new_scenes([(3, 0), (3, 0)])
    folder = make_store(scenes, num_shards=1)
    file = Path(folder) / "shard-00000-of-00001.array_record"
    data = file.read_bytes()
    at = data.index(scenes[1].scene.codes.tobytes())
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    store = Store(folder)
    np.testing.assert_array_equal(store.scene(0).codes, scenes[0].scene.codes)
    with pytest.raises(UserError, match=r"shard-00000-of-00001\.array_record, record 1: "):
        store.scene(1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 16×16 grids that spans many of ArrayRecord's 64 KiB blocks, and the codes of its scenes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("large")
    shapes = [(1, 1)] * 130 + [(40, 1), (3, 2), (1, 1), (200, 1), (1, 2)] + [(1, 1)] * 70
    codes = [rng.integers(0, 8192, (*shape, 256), dtype=np.uint16) for shape in shapes]
    scenes = [GroupedScene(Scene(f"scene {i}", i, 1 if x.shape[1] == 2 else 0, x), str(i)) for i, x in enumerate(codes)]
    for shard, shard_scenes in enumerate((scenes[:150], scenes[150:])):
        writer.write_shard(folder, shard, 2, shard_scenes, 8192)
    header = {
        "tokenizer": {"weights": "", "hash": "", "grid": [16, 16], "num_codes": 8192},
        "streams": {"rgb": Image().to_json(), "depth": Image().to_json()},
        "stream_sets": [["rgb"], ["rgb", "depth"]],
        "classes": [],
    }
    assert not writer.write_manifest(folder, header, 2)
    store = Store(folder)
    return store, [codes[i] for i in store.entries(np.arange(len(store)))["class_id"]]


@given(st.data())
def test_grids_reads_any_grids_in_any_order(large, data):
    store, codes = large
    scenes = np.array(data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=40)))
    frames = np.array([data.draw(st.integers(0, len(codes[i]) - 1)) for i in scenes])
    streams = np.array([data.draw(st.integers(0, codes[i].shape[1] - 1)) for i in scenes])
    grids = store.grids(store.entries(scenes), frames, streams)
    expected = [codes[i][t, s] for i, t, s in zip(scenes, frames, streams, strict=True)]
    np.testing.assert_array_equal(grids, expected)


def test_grids_and_scene_read_the_same_codes(large):
    store, codes = large
    for i, expected in enumerate(codes):
        frames, streams = (x.ravel() for x in np.indices(expected.shape[:2]))
        entries = store.entries(np.full(len(frames), i))
        np.testing.assert_array_equal(store.grids(entries, frames, streams), expected.reshape(-1, 256))
        np.testing.assert_array_equal(store.scene(i).codes, expected)


def test_grids_rejects_a_position_past_the_record(large):
    store, _ = large
    entry = store.entries(np.array([0]))
    assert store.grids(entry[:0], np.zeros(0, int), np.zeros(0, int)).shape == (0, 256)
    with pytest.raises(DamagedError, match=r"record 0: damaged"):
        store.grids(entry, np.array([64]), np.array([0]))


def test_open_file_limit_is_raised_and_reported(make_store, new_scenes, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    records._raise_open_file_limit.cache_clear()
    folder = make_store(MIXED)
    store = Store(folder)
    assert limits == [(4096, 4096)]

    def none_left(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files, "sha256", none_left)
    with pytest.raises(UserError, match=r"shard-00000-of-00002\S*: Too many open files: .* 20; .*ulimit"):
        store.entries(np.array([0]))
    records._raise_open_file_limit.cache_clear()


def test_damage_loses_only_the_four_grids_of_a_block(make_store, new_scenes):
    scenes = new_scenes([(16, 0)])
    folder = make_store(scenes, num_shards=1)
    file = Path(folder) / "shard-00000-of-00001.array_record"
    data = bytearray(file.read_bytes())
    data[data.index(scenes[0].scene.codes[5, 0].tobytes())] ^= 1
    file.write_bytes(data)
    store = Store(folder)
    for frame in range(16):
        arguments = store.entries(np.array([0])), np.array([frame]), np.array([0])
        if 4 <= frame < 8:
            with pytest.raises(DamagedError, match=r"array_record, record 0: damaged: .*mismatch"):
                store.grids(*arguments)
        else:
            np.testing.assert_array_equal(store.grids(*arguments)[0], scenes[0].scene.codes[frame, 0])


@pytest.mark.parametrize(("scenes", "frames"), [(20_000, 1), (2_000, 16)])
def test_shard_overhead_is_at_most_two_percent(tmp_path, scenes, frames):
    codes = np.random.default_rng(0).integers(0, 8192, (frames, 1, 256), dtype=np.uint16)
    items = [GroupedScene(Scene(f"scene-{i:06d}", -1, 0, codes), "") for i in range(scenes)]
    entry = writer.write_shard(tmp_path, 0, 1, items, 8192)
    codes_and_keys = scenes * (512 * frames + len("scene-000000"))
    size = entry["files"]["shard-00000-of-00001.array_record"]["bytes"]
    padding = 2 * 65536  # array_record pads its footer and its last block
    assert codes_and_keys < size <= 1.02 * codes_and_keys + padding


def test_store_contains_no_time_and_no_path(make_store):
    folder = make_store(MIXED)
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    header = {"tokenizer", "streams", "stream_sets", "classes"}
    totals = {"scenes", "images", "images_by_stream", "histogram", "group_hashes", "versions"}
    assert set(manifest) == {"version", "shards"} | header | totals
    assert all(folder.encode() not in data for data in contents(folder).values())
