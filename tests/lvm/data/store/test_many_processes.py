"""Stores on slow storage: begun by many processes at once, finished with one listing and one read of each entry."""

import concurrent.futures
import json

import pytest

from lvm.common import files
from tests.commands import run


@pytest.mark.parametrize(("processes", "rounds"), [(8, 2), pytest.param(64, 20, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(("shards", "latency_ms"), [(1000, 1), pytest.param(25_000, 50, marks=pytest.mark.slow)])
def test_finishing_reads_each_entry_once(shards, latency_ms):
    row = json.loads(run("scripts.benchmark_finish", f"--shards={shards}", f"--latency_ms={latency_ms}"))
    assert row["requests_per_shard"] < 1.1
    assert row["finish_s"] < 5 * 60
    assert row["peak_mb"] < 500
    assert (row["open_requests"], row["scenes"]) == (2, 65_600 * shards)
    assert row["open_mb"] < 50
