"""Local backend with real processes: ranks that are terminated, killed, stopped or diverge."""

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest

from lvm.launch import local
from lvm.training import metrics
from tests.commands import run, start

FEW = ["--config.loop.total_steps=40", "--config.loop.checkpoint_every=10", "--config.loop.evaluate_every=0"]
MANY = [
    "--config.loop.total_steps=4000",
    "--config.loop.checkpoint_every=20",
    "--config.loop.evaluate_every=0",
]


def arguments(demo, workdir, *more, processes=2):
    backend = ["--on=local", f"--processes={processes}"]
    config = ["--config=tests/configs/tiny_lvm.py", f"--config.data.store={demo / 'store'}"]
    config += ["--config.batch_size=4", "--config.loop.log_every=1", "--config.loop.picture_every=0"]
    return [*backend, *config, f"--workdir={workdir}", "--config.mesh.fsdp=2", *more]


class Run:
    """A supervised run and its output so far."""

    def __init__(self, demo, workdir, *more, devices=2):
        self.process = start("lvm.submit", *arguments(demo, workdir, *more), devices=devices)
        self.output = ""

    def until(self, words, start=0):
        """Reads output up to a line with `words`, from `start` on."""
        while words not in self.output[start:]:
            line = self.process.stdout.readline()
            assert line, f"ended before {words!r}:\n{self.output}"
            self.output += line

    def signal(self, rank, signum):
        pids = re.findall(r"processes (\d+(?:, \d+)*)$", self.output, re.MULTILINE)[-1].split(", ")
        os.kill(int(pids[rank]), signum)

    def wait(self):
        """Exit code."""
        self.output += self.process.communicate(timeout=200)[0]
        return self.process.returncode


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read_metrics(workdir)}


@pytest.mark.alone
def test_submit_sigterm_to_one_rank_saves_on_all(demo, tmp_path):
    first = Run(demo, tmp_path / "run", *MANY, "--max_restarts=0")
    first.until(" 15/")
    first.signal(1, signal.SIGTERM)
    assert first.wait() == 75, first.output
    saved = int(re.search(r"saved at step (\d+)", first.output)[1])
    assert max(losses(tmp_path / "run")) == saved
    second = Run(demo, tmp_path / "run", *MANY, "--max_restarts=0")
    second.until(f"from step {saved}")
    second.until(f" {saved + 3}/")
    second.process.send_signal(signal.SIGTERM)  # to the supervisor, which forwards it
    assert second.wait() == 75, second.output
    assert list(losses(tmp_path / "run")) == list(range(1, max(losses(tmp_path / "run")) + 1))


@pytest.mark.alone
@pytest.mark.parametrize("rank", [0, 1])
def test_submit_killed_rank_ends_run_which_resumes(demo, tmp_path, rank):
    # Rank 0 is the coordinator.
    options = [*MANY, "--config.loop.total_steps=120"]
    killed = Run(demo, tmp_path / "run", *options, "--grace=5", "--max_restarts=1")
    killed.until(" 45/")
    start_time = time.monotonic()
    killed.signal(rank, signal.SIGKILL)
    killed.until("restart 1 of 1 from step")
    assert time.monotonic() - start_time < 15
    assert f"process {rank} of 2 ended with exit code 137" in killed.output
    assert killed.wait() == 0, killed.output
    assert "resuming from step 40" in killed.output
    unbroken = Run(demo, tmp_path / "unbroken", *options)
    assert unbroken.wait() == 0, unbroken.output
    # The same mesh and process count: the same bits.
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


@pytest.mark.alone
def test_submit_survives_ten_kills_of_random_ranks(demo, tmp_path):
    total, every, kills = 200, 10, 10
    options = [f"--config.loop.total_steps={total}", "--config.loop.checkpoint_every=100", "--processes=4"]
    options += ["--config.loop.evaluate_every=0", "--config.mesh.fsdp=4"]
    options += [f"--config.loop.local_checkpoint.every={every}"]
    folder = f"--config.loop.local_checkpoint.folder={tmp_path / 'local'}"
    random_numbers = random.Random(0)
    storm = Run(demo, tmp_path / "run", *options, folder, "--max_restarts=3", "--grace=1", devices=1)
    lost = []
    for target in sorted(random_numbers.sample(range(every, total - 1), kills)):
        logged = 0
        while logged < target:
            storm.until(" left, loss", len(storm.output))
            logged = int(re.findall(rf"(\d+)/{total} steps", storm.output)[-1])
        storm.signal(random_numbers.randrange(4), signal.SIGKILL)
        start = len(storm.output)
        storm.until(" of 3 from step", start)
        reached = int(re.findall(rf"(\d+)/{total} steps", storm.output)[-1])
        storm.until("resuming from step", start)
        lost.append(reached - int(re.findall(r"resuming from step (\d+)", storm.output)[-1]))
    assert storm.wait() == 0, storm.output
    print(f"steps lost at each of {kills} kills: {lost}")
    assert max(lost) <= 2 * every, lost
    assert not any((tmp_path / "local").iterdir())
    unbroken = Run(demo, tmp_path / "unbroken", *options, devices=1)
    assert unbroken.wait() == 0, unbroken.output
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


@pytest.mark.alone
@pytest.mark.parametrize("killed", [0, 1])
def test_hosts_with_supervisors_of_their_own_recover(demo, tmp_path, monkeypatch, killed):
    # As on TPU VMs and in pods: each host restarts its process, and waits for the other's.
    monkeypatch.setenv("LVM_COORDINATOR", f"localhost:{local.free_port()}")
    monkeypatch.setenv("LVM_NUM_PROCESSES", "2")
    options = [*MANY, "--config.loop.total_steps=120", "--processes=1", "--max_restarts=2"]
    hosts = []
    for rank in range(2):
        monkeypatch.setenv("LVM_PROCESS_ID", str(rank))
        hosts.append(Run(demo, tmp_path / "run", *options, f"--run=host-{rank}", f"--out={tmp_path / str(rank)}"))
    hosts[0].until(" 45/")
    hosts[killed].until("processes ")
    hosts[killed].signal(0, signal.SIGKILL)
    for host in hosts:
        assert host.wait() == 0, host.output
        assert "restart 1 of 2 from step" in host.output
        assert "restart 2 of 2" not in host.output
    assert list(losses(tmp_path / "run")) == list(range(1, 121))


@pytest.mark.alone
def test_submit_watchdog_detects_stopped_rank(demo, tmp_path):
    watchdog = ["--config.loop.watchdog.min_timeout_s=5.0", "--config.loop.watchdog.pause_timeout_s=30.0"]
    options = [*MANY, "--config.loop.total_steps=200", *watchdog, "--grace=1", "--max_restarts=1"]
    stopped = Run(demo, tmp_path / "run", *options)
    stopped.until(" 45/")
    stopped.signal(1, signal.SIGSTOP)
    start_time = time.monotonic()
    stopped.until("restart 1 of 1 from step")
    assert time.monotonic() - start_time < 5 + 30 + 10
    assert re.search(r"\[0\] .*stalled", stopped.output)
    assert "lvm/training/loop.py" in stopped.output  # the stacks
    assert stopped.wait() == 0, stopped.output


@pytest.mark.alone
def test_train_rank_ends_within_heartbeat_timeout(demo, tmp_path):
    flags = [f for f in arguments(demo, tmp_path / "run", *MANY) if not f.startswith(("--on", "--processes"))]
    ranks = []
    for rank in range(2):
        os.environ |= {
            "LVM_COORDINATOR": "localhost:29517",
            "LVM_NUM_PROCESSES": "2",
            "LVM_PROCESS_ID": str(rank),
        }
        ranks.append(start("lvm.train", *flags, "--config.distributed.heartbeat_timeout=10", devices=2))
    for name in ("LVM_COORDINATOR", "LVM_NUM_PROCESSES", "LVM_PROCESS_ID"):
        del os.environ[name]
    while " 10/" not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[1].kill()
    start_time = time.monotonic()
    ranks[0].communicate(timeout=60)
    assert ranks[0].returncode != 0
    assert time.monotonic() - start_time < 30


@pytest.mark.alone
def test_submit_losses_do_not_depend_on_process_count(demo, tmp_path):
    # A schedule that does not depend on the number of steps, so that one run can end earlier.
    few = [*FEW, "--config.optimizer.schedule=constant", "--config.optimizer.end_learning_rate=3e-5"]
    run("lvm.submit", *arguments(demo, tmp_path / "one", *few, processes=1), devices=4)
    run("lvm.submit", *arguments(demo, tmp_path / "two", *few, "--config.loop.total_steps=20"), devices=2)
    run("lvm.submit", *arguments(demo, tmp_path / "two", *few, processes=1), devices=4)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert list(two) == list(range(1, 41))


def test_submit_bad_input_is_final(demo, tmp_path):
    invalid = arguments(demo, tmp_path, "--config.model.num_heads=5", processes=1)
    output = run("lvm.submit", *invalid, code=2)
    assert output.count("error: ") == 1
    assert "num_heads" in output
    assert "restart" not in output


def test_submit_requires_config():
    assert "--config: required" in run("lvm.submit", "--workdir=/nowhere", code=2)


def test_submit_divergence_is_final(demo, tmp_path):
    diverging = [
        "--config.optimizer.learning_rate=1e38",
        "--config.loop.max_skipped=2",
        "--config.mesh.fsdp=1",
    ]
    flags = arguments(demo, tmp_path, *diverging, "--config.optimizer.warmup_steps=0", processes=1)
    output = run("lvm.submit", *flags, code=65)
    assert "no finite gradient in 2 steps" in output
    assert "restart" not in output
    assert json.loads((tmp_path / "diverged.json").read_text())["batches"]
