"""Random access to the grids of a store's shards."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UnavailableError
from lvm.data.store import shards, writer
from lvm.data.store.format import DamagedError, Scene
from lvm.data.store.reader import Store
from lvm.data.streams.codecs import Image

preadv = os.preadv


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 16×16 grids, and the codes of its scenes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("large")
    shapes = [(1, 1)] * 130 + [(40, 1), (3, 2), (1, 1), (200, 1), (1, 2)] + [(1, 1)] * 70
    codes = [rng.integers(0, 8192, (*shape, 256), dtype=np.uint16) for shape in shapes]
    scenes = [Scene(f"scene {i}", "", ("rgb", "depth")[: x.shape[1]], x, i) for i, x in enumerate(codes)]
    for shard, shard_scenes in enumerate((scenes[:150], scenes[150:])):
        writer.write_shard(folder, shard, 2, shard_scenes, 8192)
    header = {
        "tokenizer": {"weights": "", "hash": "", "grid": [16, 16], "num_codes": 8192},
        "streams": {"rgb": Image().to_json(), "depth": Image().to_json()},
    }
    assert not writer.write_manifest(folder, header, 2)
    store = Store(folder)
    return store, codes


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


@pytest.mark.parametrize(
    ("frames", "reads"),
    [
        ([*range(100, 110), *range(10)], [(0, 10), (100, 10)]),  # in any order
        ([9, 5, 5, 2, 8, 9, 10], [(2, 1), (5, 1), (8, 3)]),  # once
        ([20, 2, 37, 60, 61, 62, 38], [(2, 1), (20, 1), (37, 2), (60, 3)]),
    ],
)
def test_grids_are_read_once_and_nothing_between_them(large, monkeypatch, frames, reads):
    store, codes = large
    i = next(i for i, x in enumerate(codes) if len(x) == 200)
    entries = store.entries(np.full(len(frames), i))
    first, size = int(entries["first_grid"][0]), 2 * 256 + 4
    calls = []
    monkeypatch.setattr(shards.os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    read = store.grids(entries, np.array(frames), np.zeros(len(frames), int))
    assert sorted((offset // size - first, len(target) // size) for _, (target,), offset in calls) == reads
    np.testing.assert_array_equal(read, codes[i][frames, 0])


def test_grids_rejects_frames_and_streams_outside_the_scene(large):
    store, _ = large
    entry = store.entries(np.array([0]))
    assert store.grids(entry[:0], np.zeros(0, int), np.zeros(0, int)).shape == (0, 256)
    for frame, stream in ((1, 0), (0, 2)):
        with pytest.raises(ValueError, match=rf"frame {frame}, stream {stream}"):
            store.grids(entry, np.array([frame]), np.array([stream]))


@pytest.mark.parametrize(("code", "error"), [(errno.ESTALE, UnavailableError), (errno.EIO, DamagedError)])
def test_outage_of_a_file_system_is_no_damage(make_store, monkeypatch, code, error):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    store = Store(make_store([(1, 0)]))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(error):
        store.scene(0)


def test_outage_of_object_storage_is_one_line(monkeypatch):
    def fail(parts):
        raise TimeoutError("gs://bucket/a: no answer\nwithin 120 s")

    monkeypatch.setattr(shards, "read_ranges", fail)
    with pytest.raises(UnavailableError, match=r"^gs://bucket/a: no answer within 120 s$"):
        shards.fetch([])
