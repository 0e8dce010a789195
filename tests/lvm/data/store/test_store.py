"""Store: round trip, reproducible bytes, checks of damaged and missing files."""

import dataclasses
import errno
import json
import os
import re
import resource
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture import split
from lvm.data.store import failures, reader, writer
from lvm.data.store import shards as shards_module
from lvm.data.store.format import SECTIONS, DamagedError, Scene
from lvm.data.store.reader import Store
from lvm.data.store.verify import find_problems
from lvm.data.store.writer import SkippedItems
from tests.lvm.conftest import STREAM_SETS, header

MIXED = [(1, 0)] * 70 + [(3, 0), (1, 1)] + [(1, 0)] * 5 + [(2, 2), (1, 0)]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_store_returns_single_images_and_longer_scenes(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    store = Store(make_store(scenes, num_shards=3))
    assert len(store) == len(scenes)
    by_key = {store.scene(i).key: (store.scene(i), entry) for i, entry in enumerate(store.index)}
    assert len(by_key) == len(scenes)
    for item in scenes:
        scene, entry = by_key[item.key]
        np.testing.assert_array_equal(scene.codes, item.codes)
        assert (scene.class_name, scene.streams) == (item.class_name, item.streams)
        assert (entry["frames"], store.stream_sets[entry["stream_set"]]) == (len(scene.codes), scene.streams)
        assert ([*store.classes, ""][entry["class_id"]], entry["group"]) == (scene.class_name, item.group)


def test_scenes_keep_the_order_of_the_source(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    store = Store(make_store(scenes, num_shards=3))
    assert [store.scene(i).key for i in range(len(store))] == [scene.key for scene in scenes]


def test_codes_file_holds_grids_and_their_checksums(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    folder = make_store(scenes, num_shards=1)
    mapped = np.memmap(f"{folder}/shard-00000-of-00001.codes", "<u2").reshape(-1, 4 + 2)
    codes, checksums = mapped[:, :4], np.ascontiguousarray(mapped[:, 4:]).view("<u4")[:, 0]
    expected = [google_crc32c.extend(number, grid.tobytes()) for number, grid in enumerate(codes)]
    assert checksums.tolist() == expected
    np.testing.assert_array_equal(codes, np.concatenate([scene.codes.reshape(-1, 4) for scene in scenes]))
    index = Store(folder).index
    for entry, scene in zip(index, scenes, strict=True):
        T, S, _ = scene.codes.shape
        for frame, stream in np.ndindex(T, S):
            np.testing.assert_array_equal(codes[entry["first_grid"] + frame * S + stream], scene.codes[frame, stream])


def test_sections_of_the_index_can_be_mapped(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    folder = make_store(scenes, num_shards=1)
    sections = files.read_json(f"{folder}/shard-00000-of-00001.json")["sections"]

    def section(name):
        place = sections[name]
        assert place["offset"] % 8 == 0
        shape = place["bytes"] // SECTIONS[name].itemsize
        return np.memmap(f"{folder}/shard-00000-of-00001.index", SECTIONS[name], "r", place["offset"], shape)

    assert section("scenes")["frames"].tolist() == [len(scene.codes) for scene in scenes]
    assert section("key_offsets")[-1] == len(section("keys"))
    assert section("keys").tobytes().decode() == "".join(scene.key for scene in scenes)
    assert sections["marks"]["bytes"] == sections["mark_offsets"]["bytes"] == 0


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def shards(draw):
    """The scenes of a shard, with the number of codes of a grid."""
    N, scenes = draw(st.integers(1, 6)), []
    for i in range(draw(st.integers(1, 12))):
        frames, stream_set = draw(st.integers(1, 9)), draw(st.integers(0, 2))
        codes = draw(hnp.arrays(np.uint16, (frames, len(STREAM_SETS[stream_set]), N), fill=st.integers(0, 2**16 - 1)))
        group, class_name = draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from(["", "dog", "cat", "Kätzchen"]))
        streams, marks = STREAM_SETS[stream_set], draw(st.binary(max_size=3))
        scenes.append(Scene(f"{draw(keys)} {i}", class_name, streams, codes, group, marks))
    return scenes, N


@given(shards(), st.data())
def test_written_scenes_are_read_back(tmp_path_factory, shard, data):
    scenes, N = shard
    folder = tmp_path_factory.mktemp("store")
    writer.write_shard(folder, 0, 1, scenes, 2**16)
    assert not writer.write_manifest(folder, header(grid=(1, N)), 1)
    store = Store(folder)
    assert len(store) == len(scenes)
    for i, (entry, scene) in enumerate(zip(store.index, scenes, strict=True)):
        copy = store.scene(i)
        np.testing.assert_array_equal(copy.codes, scene.codes)
        for name in ("key", "class_name", "streams", "group", "marks"):
            assert getattr(copy, name) == getattr(scene, name)
        assert (entry["frames"], entry["group"]) == (len(scene.codes), scene.group)
    if not scenes:
        return
    # A changed byte anywhere in the codes is named by the scene and the frame that it belongs to.
    file, i = folder / "shard-00000-of-00001.codes", data.draw(st.integers(0, len(scenes) - 1))
    T, S, _ = scenes[i].codes.shape
    frame, stream, byte = (data.draw(st.integers(0, n - 1)) for n in (T, S, 2 * N + 4))
    content = bytearray(file.read_bytes())
    content[(2 * N + 4) * (int(store.index["first_grid"][i]) + frame * S + stream) + byte] ^= data.draw(
        st.integers(1, 255)
    )
    file.write_bytes(content)
    entry = Store(folder).entries(np.array([i]))
    for read in (
        lambda store: store.scene(i),
        lambda store: store.grids(entry, np.array([frame]), np.array([stream])),
    ):
        with pytest.raises(DamagedError) as error:
            read(Store(folder))
        assert str(error.value) == f"{file}, scene {scenes[i].key!r} frame {frame}: damaged: checksum mismatch"
    assert list(find_problems(Store(folder)))[1] == str(error.value)


def test_store_has_streams_classes_and_num_codes(make_store):
    store = Store(make_store(MIXED))
    assert store.stream_sets == sorted({STREAM_SETS[stream_set] for _, stream_set in MIXED})
    assert store.streams["segmentation"].names == ("nothing", "thing")
    assert (store.classes, store.codes_per_image, store.num_codes) == (["cat", "dog"], 4, 16)


def test_manifest_counts_scenes_images_and_codes(make_store, new_scenes):
    scenes = new_scenes(MIXED)
    store = Store(make_store(scenes))
    manifest = store.manifest
    assert sum(shard.entry["scenes"] for shard in store.shards) == len(MIXED)
    assert sum(shard.entry["images"] for shard in store.shards) == 76 + 3 + 2 + 4
    counts = np.bincount(np.concatenate([item.codes.ravel() for item in scenes]), minlength=16)
    histogram = np.sum([shard.section("histogram") for shard in store.shards], axis=0)
    np.testing.assert_array_equal(histogram, counts)
    assert manifest["codes_used"] == np.count_nonzero(counts)
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
    assert entry["failures"] == {"cut off": 1}
    assert list(failures.read(tmp_path)) == [{"key": "broken", "reason": "cut off"}]
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
    other[0].codes[0, 0, 0] ^= 1
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
    with pytest.raises(UserError, match=r"manifest\.json: version 1, expected 4; encode it again"):
        Store(folder)


@pytest.mark.parametrize(("version", "remedy"), [(None, "encode it again"), (3, "lvm convert-store {} NEW")])
def test_other_versions_are_neither_continued_nor_finished(tmp_path, new_scenes, manifest_header, version, remedy):
    writer.begin_store(tmp_path, manifest_header(), 1)
    writer.write_shard(tmp_path, 0, 1, new_scenes(MIXED), 16)
    header = files.read_json(tmp_path / "header.json")
    assert header.pop("version") == 4
    files.write_json(tmp_path / "header.json", header | ({"version": version} if version else {}))
    message = re.escape(f"header.json: version {version}, expected 4; ") + ".*" + re.escape(remedy.format(tmp_path))
    with pytest.raises(UserError, match=message):
        writer.finish_store(tmp_path)
    with pytest.raises(UserError, match=message):
        writer.begin_store(tmp_path, manifest_header(), 1)
    assert not (tmp_path / reader.MANIFEST).exists()


@pytest.mark.parametrize("suffix", ["index", "codes"])
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
        if file.name not in (reader.MANIFEST, "manifest.index"):
            file.unlink()
    assert len(Store(folder)) == len(MIXED)


def test_grid_at_another_place_is_damaged(make_store, new_scenes):
    folder = make_store(new_scenes([(1, 0)] * 3), num_shards=1)
    file = Path(folder) / "shard-00000-of-00001.codes"
    content = file.read_bytes()
    file.write_bytes(content[12:24] + content[:12] + content[24:])
    for i in (0, 1):
        with pytest.raises(DamagedError, match=rf"{file}, scene 'scene {i}' frame 0: damaged"):
            Store(folder).scene(i)
    assert Store(folder).scene(2).key == "scene 2"


@pytest.mark.parametrize("section", sorted(SECTIONS.keys() - {"histogram"}))  # which reading does not need
def test_damaged_section_ends_reading_with_one_line(make_store, new_scenes, section):
    scenes = [dataclasses.replace(scene, marks=b"marks") for scene in new_scenes(MIXED)]
    folder = make_store(scenes, num_shards=1)
    file = Path(folder) / "shard-00000-of-00001.index"
    flip(file, files.read_json(f"{folder}/shard-00000-of-00001.json")["sections"][section]["offset"])
    with pytest.raises(UserError, match=rf"^{file}: damaged: section {section}: checksum mismatch$") as error:
        Store(folder).scene(0)
    assert not isinstance(error.value, DamagedError)


def test_open_file_limit_is_raised_and_reported(make_store, new_scenes, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    shards_module._raise_open_file_limit.cache_clear()
    folder = make_store(MIXED)
    store = Store(folder)
    assert limits == [(4096, 4096)]

    def none_left(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "memmap", none_left)
    with pytest.raises(UserError, match=r"^/.*\.index: Too many open files: .* 20; .*ulimit"):
        store.entries(np.array([0]))
    shards_module._raise_open_file_limit.cache_clear()


def test_damage_loses_one_grid(make_store, new_scenes):
    scenes = new_scenes([(16, 0)])
    folder = make_store(scenes, num_shards=1)
    file = Path(folder) / "shard-00000-of-00001.codes"
    data = bytearray(file.read_bytes())
    data[data.index(scenes[0].codes[5, 0].tobytes())] ^= 1
    file.write_bytes(data)
    store = Store(folder)
    for frame in range(16):
        arguments = store.entries(np.array([0])), np.array([frame]), np.array([0])
        if frame == 5:
            with pytest.raises(DamagedError, match=r"codes, scene 'scene 0' frame 5: damaged: .*mismatch"):
                store.grids(*arguments)
        else:
            np.testing.assert_array_equal(store.grids(*arguments)[0], scenes[0].codes[frame, 0])


@pytest.mark.parametrize(("scenes", "frames"), [(20_000, 1), (2_000, 16)])
def test_index_takes_24_bytes_a_scene(tmp_path, scenes, frames):
    codes = np.random.default_rng(0).integers(0, 8, (frames, 1, 256), dtype=np.uint16)
    keys = [f"scene-{i:06d}" for i in range(scenes)]
    entry = writer.write_shard(tmp_path, 0, 1, [Scene(key, "", ("rgb",), codes, 0) for key in keys], 8)
    sizes = {name.partition(".")[2]: file["bytes"] for name, file in entry["files"].items()}
    assert sizes["codes"] == scenes * 516 * frames
    names, histogram = len('{"classes": [], "stream_sets": [["rgb"]]}'), 8 * 8
    expected = scenes * (24 + len(keys[0])) + 4 + names + histogram  # 4: the end of the last key
    assert expected <= sizes["index"] <= expected + 40


def test_store_contains_no_time_and_no_path(make_store):
    folder = make_store(MIXED)
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    header, merged = {"tokenizer", "streams"}, {"stream_sets", "classes", "sections", "files"}
    totals = {"scenes", "images", "images_by_stream", "codes_used", "group_hashes", "versions", "failures"}
    assert set(manifest) == {"version", "num_shards"} | header | merged | totals
    assert all(folder.encode() not in data for data in contents(folder).values())
