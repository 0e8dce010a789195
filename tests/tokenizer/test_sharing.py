"""Processes that share the shards of a store by claims: balance, takeover, equal bytes."""

import concurrent.futures
import contextlib
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from lvm.data.store import writer
from lvm.data.store.shard_queue import ShardQueue
from tests.commands import ROOT
from tests.tokenizer import slow_codes

PROGRAM = [sys.executable, "-m", "tests.tokenizer.slow_codes"]


def contents(folder):
    assert not writer.finish_store(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextlib.contextmanager
def processes(folder, num_scenes, num_shards, seconds):
    """Processes that are about to start, one for each number of seconds a scene."""
    commands = [[*PROGRAM, folder, str(num_scenes), str(num_shards), str(each)] for each in seconds]
    started = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        while len(list(folder.parent.glob(f"{folder.name}.ready-*"))) < len(seconds):
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def num_written(folder):
    return len(list(folder.glob("*.json"))) - 1  # besides the header


def test_killed_process_leaves_its_shard_to_others(tmp_path):
    scenes, shards, folder = 48, 12, tmp_path / "store"
    with processes(folder, scenes, shards, [1.0]) as (victim,):
        pathlib.Path(f"{folder}.go").touch()
        while not list(folder.glob("claims/shard*")):
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert num_written(folder) == 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(slow_codes.encode, folder, scenes, shards, each) for each in (0.01, 0.02)]:
            done.result(timeout=60)
    assert not list(folder.glob("claims/shard*"))
    slow_codes.encode(tmp_path / "reference", scenes, shards, 0.0)
    assert contents(folder) == contents(tmp_path / "reference")


def test_process_without_a_known_rate_holds_three_shards(tmp_path):
    writer.begin_store(tmp_path, {}, 40)
    with ShardQueue(tmp_path, 40) as queue:
        taken = [*next(queue.passes())]
        assert len(taken) == 3  # one that it writes, one that it decodes, one that it lists


def test_stuck_process_keeps_few_shards_from_others(tmp_path):
    released, shards, folder = threading.Event(), 40, tmp_path / "store"

    class Stuck(slow_codes.SlowCodes):
        def load_codes(self, index):
            assert released.wait(timeout=60)
            return super().load_codes(index)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(slow_codes.copy, Stuck(shards, 0.0), folder, shards)
        while not list(folder.glob("claims/shard*")):
            time.sleep(0.01)
        other = pool.submit(slow_codes.encode, folder, shards, shards, 0.0)
        deadline = time.monotonic() + 50
        while num_written(folder) < shards - 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        missing = shards - num_written(folder)
        released.set()
        assert missing <= 3
        for each in (stuck, other):
            each.result(timeout=60)
    assert contents(folder)


@pytest.mark.alone
def test_slow_and_killed_processes_cost_little(tmp_path, capsys):
    scenes, shards, folder = 1600, 160, tmp_path / "store"
    fast, slow, total = 0.05, 0.5, 1600
    with processes(folder, scenes, shards, [fast, fast, fast, slow]) as started:
        pathlib.Path(f"{folder}.go").touch()
        start = time.monotonic()
        while num_written(folder) < shards // 2:
            time.sleep(0.01)
        started[0].send_signal(signal.SIGKILL)
        killed_s = time.monotonic() - start
        for process in started[1:]:
            assert process.wait(timeout=300) == 0
        seconds = time.monotonic() - start
    rate = 2 / fast + 1 / slow  # of the others
    ideal = killed_s + max(0.0, total - killed_s * (rate + 1 / fast)) / rate
    with capsys.disabled():
        print(f"\n{seconds:.1f} s, ideal {ideal:.1f} s, {seconds / ideal:.2f} ×; killed after {killed_s:.1f} s")
    assert seconds <= 1.3 * ideal
    slow_codes.encode(tmp_path / "reference", scenes, shards, 0.0)
    assert contents(folder) == contents(tmp_path / "reference")
