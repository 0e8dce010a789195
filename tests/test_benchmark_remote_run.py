"""Whole runs with the store on an object server with faults, by real processes."""

import pytest

from scripts import benchmark_store
from scripts.benchmark_remote_run import measure_run, measure_start


@pytest.fixture
def folder(tmp_path):
    """A folder with a store in its bucket."""
    (tmp_path / "bucket" / "store").mkdir(parents=True)
    benchmark_store.make_store(tmp_path / "bucket" / "store", 80_000, 1)
    return tmp_path


@pytest.mark.alone
@pytest.mark.parametrize("processes", [1, 4])
def test_start_reads_at_most_twice_what_is_owned(folder, processes):
    figures = measure_start(folder, processes)
    assert len(figures) == processes
    assert all(owned / 2 < read <= 2 * owned for read, owned in figures), figures


@pytest.mark.alone
def test_eight_processes_train_from_object_storage(folder, capsys):
    assert measure_run(folder, 8, 50) == 0
    assert "8 processes, 50 steps: exit code 0" in capsys.readouterr().out
