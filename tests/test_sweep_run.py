"""A sweep as a user runs it: planned, killed at random moments, resumed; a run that fails stops nothing."""

import random

import pytest

from lvm.scaling.results import read_results
from tests.commands import run, start
from tests.test_kills import kill_after

CONFIG = """
from lvm.common.config import to_config_dict
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.space import chain, decay_branches, param, product


def get_config():
    schedule = {{"optimizer.schedule": "wsd", "optimizer.decay_steps": 1}}
    shared = ({{"data.store": {store!r}, **schedule, "loop.log_every": 1, "loop.checkpoint_every": 5}},)
    limit = param("data.components.video.max_repetitions", 0.01)
    failing = product(param("width", 24), param("tokens", 196 * 20), limit)
    points = product(shared, chain(failing, decay_branches(param("width", 16), [196 * 20, 196 * 30])))
    return to_config_dict(
        SweepConfig(
            train="tests/configs/tiny_lvm.py",
            points=make_points(points),
            shape=ShapeConfig(depth="aspect", aspect=32, head_dim=8, multiple=8),
            num_codes=512,
            unique_tokens=1e6,
            device_flops=1e9,
        )
    )
"""


@pytest.mark.slow
def test_killed_sweep_has_bytes_of_unbroken_one(demo, tmp_path):
    (tmp_path / "sweep.py").write_text(CONFIG.format(store=str(demo / "store")))
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        planned = run("lvm.sweep", "plan", f"--config={tmp_path / 'sweep.py'}", f"--out={folder}")
        assert "3 runs in 2 tasks" in planned
        assert "20 from 16" in planned
    whole = run("lvm.sweep", "run", f"--sweep={folders[0]}", code=2)
    assert "1 of 3 runs failed" in whole
    assert "max_repetitions=0.01 is exceeded" in whole.splitlines()[-1]
    assert "branching off" in whole
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = start("lvm.sweep", "run", f"--sweep={folders[1]}", start_new_session=True)
        kills += kill_after(process, rng.randrange(3, 14))
    assert kills == 3
    status = run("lvm.sweep", "status", f"--sweep={folders[1]}")
    assert "1 failed" in status.splitlines()[-1]
    run("lvm.sweep", "run", f"--sweep={folders[1]}", code=2)
    assert len(read_results(folders[0])) == 2
    for name in ("sweep.json", "results.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert "2 done, 1 failed" in run("lvm.sweep", "status", f"--sweep={folders[0]}", "--watch=1")


def test_sweep_refuses_nonsense(tmp_path):
    assert "expected plan, run, status" in run("lvm.sweep", code=2)
    assert "no sweep.json in this folder" in run("lvm.sweep", "run", f"--sweep={tmp_path}", code=2)
    assert "--out: required" in run("lvm.sweep", "plan", "--config=configs/sweep_demo.py", code=2)
