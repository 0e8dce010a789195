"""Stores on slow storage: begun by many processes at once, finished with one listing and one read of each entry."""

import concurrent.futures
import errno
import json

import numpy as np
import pytest

from lvm.common import files
from lvm.data.store import writer
from lvm.data.store.format import Scene
from lvm.data.store.reader import Store
from lvm.data.store.verify import find_problems
from tests.commands import run, start
from tests.lvm.conftest import GRID, NUM_CODES, header


@pytest.mark.parametrize(("processes", "rounds"), [(8, 2), pytest.param(64, 20, marks=pytest.mark.alone)])
def test_processes_begin_a_store_at_once(tmp_path, processes, rounds):
    output = run("tests.lvm.data.store.begin_storm", tmp_path, processes, rounds, 0.05)
    assert output.splitlines()[-1] == f"{processes} processes, {rounds} rounds"
    assert "Error" not in output


def test_create_succeeds_for_one_of_several_threads(gcs, tmp_path):
    for folder in (str(tmp_path), gcs):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            created = [*pool.map(lambda i, folder=folder: files.create(f"{folder}/file", b"%d" % i), range(8))]
        assert sum(created) == 1
        assert files.read_bytes(f"{folder}/file") == b"%d" % created.index(True)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_shard_written_twice_without_locks_is_intact(tmp_path, no_file_locks):
    no_file_locks(errno.ENOLCK)
    codes = np.random.default_rng(0).integers(0, NUM_CODES, (40, 1, 1, GRID[0] * GRID[1]), np.uint16)

    def write(interrupt=lambda: None):
        def scenes():
            for i, scene in enumerate(codes):
                yield Scene(f"scene {i}", "", ("rgb",), scene, i)
                if i == 20:
                    interrupt()

        writer.write_shard(tmp_path, 0, 1, scenes(), NUM_CODES)

    writer.begin_store(tmp_path, header(), 1)
    write(interrupt=write)  # another process starts later and is done first
    assert not writer.finish_store(tmp_path)
    store = Store(tmp_path)
    assert list(find_problems(store)) == []
    np.testing.assert_array_equal([store.scene(i).codes for i in range(40)], codes)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("shards", "latency_ms"), [(1000, 1), pytest.param(25_000, 50, marks=pytest.mark.alone)])
def test_finishing_reads_each_entry_once(shards, latency_ms):
    # Not forked from a server: its libraries would count.
    process = start("scripts.benchmark_finish", f"--shards={shards}", f"--latency_ms={latency_ms}")
    row = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert row["requests_per_shard"] < 1.1
    assert row["finish_s"] < 5 * 60
    assert row["peak_mb"] < 500
    assert (row["open_requests"], row["scenes"]) == (2, 65_600 * shards)
    assert row["open_mb"] < 50
