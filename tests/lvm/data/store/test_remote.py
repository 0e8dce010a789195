"""Stores read where they lie, on object storage."""

import dataclasses
import pickle

import numpy as np
import pytest

from lvm.common import ranges
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.mixture.rows import Rows
from lvm.data.store import shards
from lvm.data.store.format import DamagedError
from lvm.data.store.reader import Store
from lvm.model.vocabulary import Vocabulary
from scripts.benchmark_remote import FAULTS, digest
from tests.object_server import Faults, object_server

SHAPES = [(1, 0)] * 70 + [(3, 0), (1, 1)] * 9 + [(2, 2), (1, 0)]
COMPONENTS = {
    "pairs": ComponentConfig(Pairs(shots=2)),
    "single": ComponentConfig(Single()),
    "video": ComponentConfig(Video(frames=2, strides=(1,))),
}


@pytest.fixture(params=["gs"])
def served(request, make_store, tmp_path):
    """A server of a store, the store's path there and on local disk."""
    local = make_store(SHAPES, "bucket/store", num_shards=3)
    with object_server(tmp_path) as server:
        yield server, f"{request.param}://bucket/store", local


both_services = pytest.mark.parametrize("served", ["gs", "s3"], indirect=True)


def rows(path, **options):
    config = MixtureConfig(COMPONENTS, (path,), 0.1, **options)
    return Rows(Mixture(config, 0), Vocabulary.for_codes(16), 40, 16)


@both_services
def test_remote_scenes_and_grids_equal_local_ones(served):
    _, remote, local = served
    store, expected = pickle.loads(pickle.dumps(Store(remote))), Store(local)
    for i in range(0, len(expected), 7):
        scene = store.scene(i)
        assert scene.key == expected.scene(i).key
        np.testing.assert_array_equal(scene.codes, expected.scene(i).codes)
    scenes = np.arange(len(expected))[::-1]
    zeros = np.zeros_like(scenes)
    codes = store.grids(store.entries(scenes), zeros, zeros)
    np.testing.assert_array_equal(codes, expected.grids(expected.entries(scenes), zeros, zeros))


@both_services
@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_remote_batches_equal_local_ones_despite_faults(served, packing):
    server, remote, local = served
    expected = rows(local, packing=packing)
    server.faults = Faults(0.005, slow_share=0.02, slow_s=0.3, error_share=0.05, drop_share=0.02, flip_share=0.002)
    actual = rows(remote, packing=packing)
    for step in range(4):
        batch = expected.batch(step)
        hosts = [actual.batch(step, np.arange(16)[host::2]) for host in range(2)]
        for name, x in batch.items():
            np.testing.assert_array_equal(hosts[0][name], x[::2])
            np.testing.assert_array_equal(hosts[1][name], x[1::2])


@pytest.mark.slow
def test_remote_batches_do_not_depend_on_hosts(served):
    server, remote, local = served
    expected = digest(rows(local), 20, 1)
    server.faults = Faults(**FAULTS)
    assert {digest(rows(remote), 20, hosts) for hosts in (1, 2, 4, 8)} == {expected}


def test_store_on_s3_needs_its_package(monkeypatch):
    def url_to_fs(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    for open_store in (Store, rows):
        with pytest.raises(UserError, match=r"s3://bucket/store.*: Install s3fs to access S3: .*lvm\[s3\]"):
            open_store("s3://bucket/store")


def test_batch_fetches_its_grids_and_no_more(served):
    server, remote, _ = served
    batches = rows(remote)
    server.keep_log = True
    before = server.counts["bytes"]
    batches.batch(0)
    assert all(path.endswith(".codes") for _, path, _ in server.log)
    used = 12 * 16 * 40 // 4  # at most: grids of four codes take 12 bytes
    assert 0 < server.counts["bytes"] - before <= 1.1 * used


@both_services
def test_groups_of_remote_scenes_equal_local_ones(served):
    """Listed ones are in the manifest; of others, the indexes of their shards alone are read, at most once."""
    server, remote, local = served
    scenes = np.arange(len(Store(local)))[::-3]
    expected = Store(local).index["group"][scenes]
    store = Store(remote)
    listed = store.heldout["scene"].astype(np.int64)
    server.keep_log = True
    np.testing.assert_array_equal(store.groups(listed), store.heldout["group"])
    assert not server.log
    np.testing.assert_array_equal(store.groups(scenes[-5:]), expected[-5:])
    assert all("shard-00000" in path for _, path, _ in server.log)
    np.testing.assert_array_equal(store.groups(scenes), expected)
    assert store.groups(scenes[:0]).tolist() == []


def test_remote_damage_is_read_once_more_then_named(served):
    server, remote, _ = served
    store = Store(remote)
    path = "bucket/store/shard-00000-of-00003.codes"
    content = bytearray(server[path])
    content[12 * 5] ^= 1
    server[path] = bytes(content)
    entry, zero = store.entries(np.array([5])), np.zeros(1, int)
    server.keep_log = True
    with pytest.raises(DamagedError, match=r"gs://bucket/store/shard-00000-of-00003.codes, scene 'scene 5' frame 0"):
        store.grids(entry, zero, zero)
    assert [path for _, path, _ in server.log].count(f"/storage/v1/b/{path.replace('bucket/', 'bucket/o/', 1)}") == 2
    del server[path]
    with pytest.raises(UserError, match=r"gs://bucket/store/shard-00000-of-00003.codes: is missing"):
        store.grids(entry, zero, zero)


def test_slow_ranges_are_requested_again():
    with object_server() as server:
        server["bucket/a"] = bytes(range(100))
        server.faults = Faults(0.01, slow_share=0.3, slow_s=3.0)
        for _ in range(3):
            parts = [ranges.Range("gs://bucket/a", i, i + 2) for i in range(60)]
            assert ranges.read_ranges(parts) == [bytes([i, i + 1]) for i in range(60)]
        assert server.counts["requests"] > 3 * 60
        with pytest.raises(OSError, match="gs://bucket/a"):
            ranges.read_ranges([ranges.Range("gs://bucket/a", 90, 110)])


def test_open_files_are_bounded(make_store, monkeypatch):
    store, opened = Store(make_store(SHAPES, num_shards=8)), []
    monkeypatch.setattr(shards._OpenFile, "__del__", lambda file: opened.append(file.descriptor), raising=True)
    monkeypatch.setattr(shards, "_codes_file", shards.functools.lru_cache(maxsize=2)(lambda shard: shard.open_codes()))
    for i in (*range(len(store)), 0):
        store.scene(i)
    assert len(opened) == 8 + 1 - 2


def test_uniform_store_is_opened_without_its_indexes(make_store, new_scenes, tmp_path):
    scenes = [dataclasses.replace(scene, class_name="") for scene in new_scenes([(1, 0)] * 3000)]
    make_store(scenes, "bucket/store", num_shards=30)
    config = MixtureConfig({"single": ComponentConfig(Single())}, ("gs://bucket/store",), 2**-9)
    with object_server(tmp_path) as server:
        train, heldout = (Mixture(config, 0, split) for split in ("train", "heldout"))
        assert train.stores[0] is heldout.stores[0]
        Rows(train, Vocabulary.for_codes(16), 40, 16)
        assert server.counts["requests"] < 10
        assert [c.num_scenes for c in train.components + heldout.components] == [2998, 2]
