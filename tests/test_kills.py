"""A training run killed at random moments, again and again, has the bits of one that never was."""

import os
import random
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lvm.training import metrics
from tests.commands import run, start

OPTIONS = [
    "--config=tests/configs/tiny_lvm.py",
    "--config.loop.log_every=1",
    "--config.loop.checkpoint_every=5",
    "--config.loop.evaluate_every=0",
    "--config.loop.picture_every=0",
]
TIMES = {"step_seconds", "input_wait_fraction", "tokens_per_second", "goodput"}  # no two runs share these


def kill_after(process: subprocess.Popen, steps: int) -> bool:
    """Kills a run when it has printed so many steps; False where it came to its end before."""
    assert process.stdout
    seen = 0
    for line in process.stdout:
        seen += line.startswith("step ")
        if seen == steps:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
    return False


def saved(workdir, step):
    """All arrays of a checkpoint, by their path."""
    found = {}
    for part in ("params", "training"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / part)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {part + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found


@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(20, 300, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_steps_has_the_bits_of_an_unbroken_one(demo, tmp_path, kills, steps):
    options = [*OPTIONS, f"--config.data.store={demo / 'store'}", f"--config.loop.total_steps={steps}"]
    run("lvm.train", *options, f"--workdir={tmp_path / 'whole'}")
    killed = 0
    for attempt in range(kills):
        moment = random.Random(attempt).randint(1, 2 * steps // (kills + 1))
        process = start("lvm.train", *options, f"--workdir={tmp_path / 'killed'}", start_new_session=True)
        killed += kill_after(process, moment)
    assert killed == kills
    assert f"step {steps}/{steps}" in run("lvm.train", *options, f"--workdir={tmp_path / 'killed'}")
    whole, parts = saved(tmp_path / "whole", steps), saved(tmp_path / "killed", steps)
    assert whole.keys() == parts.keys()
    assert len(whole) > 20
    for path, array in whole.items():
        assert array.tobytes() == parts[path].tobytes(), path
    lines = [
        [
            {name: value for name, value in line.items() if name not in TIMES}
            for line in metrics.read_metrics(folder)
        ]
        for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, steps + 1))
    assert lines[0] == lines[1]
