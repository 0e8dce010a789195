"""A sweep as a user runs it: planned, killed at random moments, resumed; a run that fails stops nothing."""

import pathlib
import random

import pytest

from lvm import sweep
from lvm.common import files
from lvm.data.store.reader import MANIFEST
from lvm.scaling.manifest import read_sweep
from lvm.scaling.results import read_results
from tests.commands import run, start
from tests.test_kills import kill_after

TRAIN = """
from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.model.transformer import ModelConfig
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig


def get_config():
    return to_config_dict(
        TrainConfig(
            batch_size=2,
            heldout_batches=1,
            model=ModelConfig(16, 24, 1, 2, context=16, dtype="float32", attention="xla"),
            data=MixtureConfig({{"photos": ComponentConfig(Single())}}, ({store!r},), heldout_fraction=0.25),
            optimizer=OptimizerConfig(schedule="wsd", decay_steps=1, warmup_steps=0),
            loop=LoopConfig(log_every=1, evaluate_every=0, picture_every=0, checkpoint_every=5),
        )
    )
"""
SWEEP = """
from lvm.common.config import to_config_dict
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.space import chain, decay_branches, param, product


def get_config():
    limit = param("data.components.photos.max_repetitions", 0.01)
    failing = product(param("width", 24), param("tokens", 32 * 20), limit)
    return to_config_dict(
        SweepConfig(
            train={train!r},
            points=make_points(chain(failing, decay_branches(param("width", 16), [32 * 20, 32 * 30]))),
            shape=ShapeConfig(depth="aspect", aspect=32, head_dim=8, multiple=8),
            num_codes=16,
            unique_tokens=1e6,
            device_flops=1e9,
        )
    )
"""


def run_to_end(folder):
    """Runs a sweep with a failing run to its end and returns the output."""
    process = start("lvm.sweep", "run", f"--sweep={folder}")
    output, _ = process.communicate()
    assert process.returncode == 2, output
    return output


@pytest.mark.slow
def test_killed_sweep_has_bytes_of_unbroken_one(make_store, tmp_path):
    store = pathlib.Path(make_store([(1, 0)] * 40))
    files.write_json(store / MANIFEST, files.read_json(store / MANIFEST) | {"source": {"kind": "folder"}})
    (tmp_path / "training.py").write_text(TRAIN.format(store=str(store)))
    (tmp_path / "sweep.py").write_text(SWEEP.format(train=str(tmp_path / "training.py")))
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        planned = run("lvm.sweep", "plan", f"--config={tmp_path / 'sweep.py'}", f"--out={folder}")
        assert "3 runs in 2 tasks" in planned
        assert "20 from 16" in planned
    whole = run_to_end(folders[0])
    assert "1 of 3 runs failed" in whole.splitlines()[-1]
    assert "max_repetitions=0.01 is exceeded" in whole.splitlines()[-1]
    assert "branching off" in whole
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = start("lvm.sweep", "run", f"--sweep={folders[1]}", start_new_session=True)
        kills += kill_after(process, rng.randrange(3, 14))
    assert kills == 3
    assert "1 failed" in run("lvm.sweep", "status", f"--sweep={folders[1]}").splitlines()[-1]
    run_to_end(folders[1])
    assert len(read_results(folders[0], read_sweep(folders[0]))) == 2
    for name in ("sweep.json", "results.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert "2 done, 1 failed" in run("lvm.sweep", "status", f"--sweep={folders[0]}", "--watch=1")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected plan, run, status"),
        (["run", "--sweep=FOLDER"], "no sweep.json in this folder"),
        (["plan", "--config=configs/sweep_demo.py"], "--out: required"),
    ],
)
def test_sweep_refuses_nonsense(tmp_path, capsys, arguments, problem):
    assert sweep.main([argument.replace("FOLDER", str(tmp_path)) for argument in arguments]) == 2
    assert problem in capsys.readouterr().err
