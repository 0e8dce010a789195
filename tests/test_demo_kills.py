"""A demo that is killed, terminated or runs out of disk resumes, and leaves nothing running."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time

import pytest

from lvm.common.errors import EXIT_PREEMPTED
from tests.commands import TINY_DEMO, comparable_results, run, start
from tokenizer import Tokenizer


def killed_demo(out: pathlib.Path, moments: list[float]) -> None:
    """Runs the tiny demo and kills it with all its processes after each of the given delays in seconds."""
    for seconds in moments:
        process = start("scripts.demo", *TINY_DEMO, f"--out={out}", start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run("scripts.demo", *TINY_DEMO, f"--out={out}")


@pytest.mark.alone
def test_demo_killed_twenty_times_gives_same_figures(demo, tmp_path):
    rng = random.Random(0)
    for attempt in range(4):
        out = tmp_path / str(attempt)
        killed_demo(out, [rng.uniform(1, 30) for _ in range(5)])
        assert comparable_results(out / "results.json") == comparable_results(demo / "results.json")


@pytest.mark.alone
def test_killed_demo_leaves_no_stage_running(tmp_path):
    process = start("scripts.demo", *TINY_DEMO, f"--out={tmp_path}", start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "tokenizer" / ".lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()  # the demo alone, not its stage
    process.communicate()
    workdir, share = f"--workdir={tmp_path / 'tokenizer'}", "--config.data.heldout_fraction=0.15"
    run("tokenizer.train", "--config=tests/configs/tiny_tokenizer.py", workdir, share)


@pytest.mark.alone
def test_terminated_demo_saves_its_stage(tmp_path):
    process = start("scripts.demo", *TINY_DEMO, f"--out={tmp_path}")
    for line in process.stdout:
        if " 10/60 steps" in line:
            process.terminate()  # the demo alone, not its stage
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    steps = [int(folder.name) for folder in (tmp_path / "tokenizer" / "checkpoints").iterdir()]
    assert 10 <= max(steps, default=0) < 60


@pytest.mark.slow
def test_full_disk_is_named_and_run_resumes(tmp_path):
    arguments = ["--config=tests/configs/tiny_tokenizer.py", f"--workdir={tmp_path}", "--config.loop.total_steps=20"]

    def no_file_beyond_4_kb() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    process = start("tokenizer.train", *arguments, preexec_fn=no_file_beyond_4_kb)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.splitlines()[-1].startswith("error: File too large"), output
    run("tokenizer.train", *arguments)
    assert Tokenizer.load(tmp_path).step == 20
