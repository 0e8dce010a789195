"""A training run killed at random steps, repeatedly, has the bits of an unbroken one."""

import os
import random
import re
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
TIMES = re.compile("(step_seconds|input_wait_fraction|tokens_per_second|goodput|badput/.*)$")  # differ between runs


def kill_after(process: subprocess.Popen, steps: int) -> bool:
    """Kills a run after so many logged steps; returns False if it ended before."""
    assert process.stdout
    seen = 0
    for line in process.stdout:
        seen += " steps/s, " in line
        if seen == steps:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
    return False


def saved(workdir, step):
    """All arrays of a checkpoint, by path."""
    arrays = {}
    for item in ("params", "training"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        arrays |= {item + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return arrays


@pytest.mark.parametrize(
    ("kills", "steps", "is_local"), [(3, 60, True), pytest.param(20, 300, False, marks=pytest.mark.slow)]
)
def test_killed_run_has_bits_of_unbroken_run(demo, tmp_path, kills, steps, is_local):
    local = []
    if is_local:
        local = ["--config.loop.local_checkpoint.every=5", "--config.loop.checkpoint_every=25"]
        local += [f"--config.loop.local_checkpoint.folder={tmp_path / 'local'}"]
    options = [*OPTIONS, *local, f"--config.data.store={demo / 'store'}", f"--config.loop.total_steps={steps}"]
    run("lvm.train", *options, f"--workdir={tmp_path / 'whole'}")
    killed = 0
    for attempt in range(kills):
        kill_step = random.Random(attempt).randint(1, 2 * steps // (kills + 1))
        process = start("lvm.train", *options, f"--workdir={tmp_path / 'killed'}", start_new_session=True)
        killed += kill_after(process, kill_step)
    assert killed == kills
    output = run("lvm.train", *options, f"--workdir={tmp_path / 'killed'}")
    assert f"{steps}/{steps} steps" in output
    assert (f"{tmp_path / 'local'}" in output) == is_local
    whole, resumed = saved(tmp_path / "whole", steps), saved(tmp_path / "killed", steps)
    assert whole.keys() == resumed.keys()
    assert len(whole) > 20
    for path, array in whole.items():
        assert array.tobytes() == resumed[path].tobytes(), path
    lines = [
        [
            {name: value for name, value in line.items() if not TIMES.match(name)}
            for line in metrics.read_metrics(folder)
        ]
        for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, steps + 1))
    assert lines[0] == lines[1]
