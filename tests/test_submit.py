"""Runs of several real processes under supervision, and what becomes of them when one is stopped, killed or stalled."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest

from lvm.training import metrics
from tests.commands import run, start

FEW = ["--config.loop.total_steps=40", "--config.loop.checkpoint_every=10", "--config.loop.evaluate_every=0"]
MANY = [
    "--config.loop.total_steps=4000",
    "--config.loop.checkpoint_every=20",
    "--config.loop.evaluate_every=0",
]


def arguments(demo, workdir, *more, processes=2):
    given = [
        "--on=local",
        f"--processes={processes}",
        "--config=tests/configs/tiny_lvm.py",
        f"--workdir={workdir}",
    ]
    given += [f"--config.data.store={demo / 'store'}", "--config.batch_size=4", "--config.loop.log_every=1"]
    return [*given, "--config.loop.picture_every=0", "--config.mesh.fsdp=2", *more]


class Run:
    """A supervised run; its output so far, and the numbers of its processes."""

    def __init__(self, demo, workdir, *more):
        self.process = start("lvm.submit", *arguments(demo, workdir, *more), devices=2)
        self.said = ""

    def until(self, words):
        """Reads on until a line holds `words`."""
        while words not in self.said:
            line = self.process.stdout.readline()
            assert line, f"ended before {words!r}:\n{self.said}"
            self.said += line

    def signal(self, rank, number):
        pids = re.findall(r"^processes (.*)$", self.said, re.MULTILINE)[-1].split(", ")
        os.kill(int(pids[rank]), number)

    def end(self):
        """The exit code."""
        self.said += self.process.communicate(timeout=200)[0]
        return self.process.returncode


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read_metrics(workdir)}


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_on_all_and_no_step_is_lost(demo, tmp_path):
    running = Run(demo, tmp_path / "run", *MANY, "--max_restarts=0")
    running.until("step 15/")
    running.signal(1, signal.SIGTERM)
    assert running.end() == 75, running.said
    saved = int(re.search(r"SIGTERM: saved at step (\d+), which took", running.said)[1])
    assert max(losses(tmp_path / "run")) == saved
    again = Run(demo, tmp_path / "run", *MANY, "--max_restarts=0")
    again.until(f"going on from step {saved}")
    again.until(f"step {saved + 3}/")
    again.process.send_signal(signal.SIGTERM)  # to the supervisor, which passes it on
    assert again.end() == 75, again.said
    assert list(losses(tmp_path / "run")) == list(range(1, max(losses(tmp_path / "run")) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_which_is_resumed(demo, tmp_path, rank):
    # Rank 0 is the coordinator.
    running = Run(
        demo, tmp_path / "run", *MANY, "--config.loop.total_steps=120", "--grace=5", "--max_restarts=1"
    )
    running.until("step 45/")
    killed = time.monotonic()
    running.signal(rank, signal.SIGKILL)
    running.until("restart 1 of 1 after exit code 137")
    assert time.monotonic() - killed < 15
    assert f"process {rank} of 2 ended with exit code 137" in running.said
    assert running.end() == 0, running.said
    assert "going on from step 40" in running.said
    whole = Run(demo, tmp_path / "whole", *MANY, "--config.loop.total_steps=120")
    assert whole.end() == 0, whole.said
    assert losses(tmp_path / "run") == losses(
        tmp_path / "whole"
    )  # the same mesh and process count: the same bits


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_by_the_watchdog_of_the_other(demo, tmp_path):
    limits = [
        "--config.loop.watchdog.min_timeout_s=5.0",
        "--config.loop.watchdog.pause_timeout_s=30.0",
        "--grace=1",
        "--max_restarts=1",
    ]
    running = Run(demo, tmp_path / "run", *MANY, "--config.loop.total_steps=200", *limits)
    running.until("step 45/")
    running.signal(1, signal.SIGSTOP)
    stopped = time.monotonic()
    running.until("restart 1 of 1 after exit code 76")
    assert time.monotonic() - stopped < 5 + 30 + 10
    assert re.search(r"\[0\] error: stalled: .* has not ended in", running.said)
    assert "lvm/training/loop.py" in running.said  # the stacks
    assert running.end() == 0, running.said


@pytest.mark.slow
def test_without_a_supervisor_the_other_rank_ends_in_the_heartbeats_time(demo, tmp_path):
    flags = [f for f in arguments(demo, tmp_path / "run", *MANY) if not f.startswith(("--on", "--processes"))]
    ranks = []
    for number in range(2):
        os.environ |= {
            "LVM_COORDINATOR": "localhost:29517",
            "LVM_NUM_PROCESSES": "2",
            "LVM_PROCESS_ID": str(number),
        }
        ranks.append(start("lvm.train", *flags, "--config.distributed.heartbeat_timeout=10", devices=2))
    for name in ("LVM_COORDINATOR", "LVM_NUM_PROCESSES", "LVM_PROCESS_ID"):
        del os.environ[name]
    while "step 10/" not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[1].kill()
    began = time.monotonic()
    ranks[0].communicate(timeout=60)
    assert ranks[0].returncode != 0
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_data_and_losses(demo, tmp_path):
    # A schedule that doesn't know how long the run is, so that one can end earlier.
    few = [*FEW, "--config.optimizer.schedule=constant", "--config.optimizer.end_learning_rate=3e-5"]
    run("lvm.submit", *arguments(demo, tmp_path / "one", *few, processes=1), devices=4)
    run("lvm.submit", *arguments(demo, tmp_path / "two", *few, "--config.loop.total_steps=20"), devices=2)
    run("lvm.submit", *arguments(demo, tmp_path / "two", *few, processes=1), devices=4)
    wanted, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    assert list(found) == list(range(1, 41))


def test_bad_input_is_not_tried_again(demo, tmp_path):
    wrong = arguments(demo, tmp_path, "--config.model.num_heads=5", processes=1)
    said = run("lvm.submit", *wrong, code=2)
    assert said.count("don't divide hidden_size") == 1
    assert "restart" not in said


def test_a_run_without_a_config_is_refused():
    assert "--config: not given" in run("lvm.submit", "--workdir=/nowhere", code=2)


def test_a_diverging_run_is_not_tried_again(demo, tmp_path):
    flags = arguments(
        demo, tmp_path, "--config.optimizer.learning_rate=1e38", "--config.loop.max_skipped=2", processes=1
    )
    said = run("lvm.submit", *flags, "--config.mesh.fsdp=1", "--config.optimizer.warmup_steps=0", code=65)
    assert "no finite gradient in 2 steps" in said
    assert "restart" not in said
    assert json.loads((tmp_path / "diverged.json").read_text())["batches"]
