"""A workdir belongs to one configuration and one run at a time."""

import dataclasses
import os
import subprocess
import sys

import pytest

from lvm.common import files
from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.training.workdir import CONFIG, Workdir, read_record
from tests.commands import ROOT

RECORD = {
    "config": {
        "seed": 0,
        "mesh": {"data": -1, "fsdp": 1},
        "model": {"remat": "none", "num_layers": 2},
        "loop": {"total_steps": 100, "log_every": 10},
        "tokenizer": "",
        "sizes": (1, 2),
    },
    "tokenizer": {"weights": "aaa"},
    "stores": ["111"],
}


def changed(**changes):
    """The record with other values, by dotted keys whose dots are written `__`."""
    record = files.as_json(RECORD)
    for key, value in changes.items():
        *parents, last = key.split("__")
        group = record
        for name in parents:
            group = group[name]
        group[last] = value
    return record


def begun(folder):
    """A run that has saved a checkpoint."""
    Workdir(folder, "lvm", RECORD)
    (folder / "checkpoints" / "10").mkdir(parents=True)


def reopen(folder, record, kind="lvm"):
    """As another process would: without the lock that this one still holds."""
    (folder / ".lock").unlink()
    return Workdir(folder, kind, record)


def test_it_is_made_with_its_record(tmp_path):
    place = Workdir(tmp_path / "runs" / "one", "lvm", RECORD)
    assert read_record(place.path, "lvm") == {"version": 1, "kind": "lvm", **files.as_json(RECORD)}


def test_the_same_configuration_opens_it_again(tmp_path):
    Workdir(tmp_path, "lvm", RECORD)
    before = (tmp_path / CONFIG).read_bytes()
    reopen(tmp_path, RECORD)
    assert (tmp_path / CONFIG).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config__mesh__fsdp": 8}, "config.mesh.fsdp: 1 → 8"),
        ({"config__model__remat": "full"}, "config.model.remat: 'none' → 'full'"),
        ({"config__loop__total_steps": 200}, "config.loop.total_steps: 100 → 200"),
        ({"config__loop__log_every": 1}, "config.loop.log_every: 10 → 1"),
        ({"config__tokenizer": "folder"}, "config.tokenizer: '' → 'folder'"),
    ],
)
def test_what_changes_no_mathematics_may_differ_and_is_said(tmp_path, caplog, change, said):
    begun(tmp_path)
    reopen(tmp_path, changed(**change))
    assert f"resuming with a changed {said}" in caplog.text
    assert read_record(tmp_path, "lvm")["config"] == changed(**change)["config"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config__seed": 1}, "config.seed: 0 → 1"),
        ({"config__model__num_layers": 3}, "config.model.num_layers: 2 → 3"),
        ({"config__sizes": [1, 3]}, "config.sizes: [1, 2] → [1, 3]"),
        ({"config__new": 5}, "config.new: None → 5"),
        ({"stores": ["222"]}, "stores: ['111'] → ['222']"),
        ({"tokenizer__weights": "bbb"}, "tokenizer.weights: 'aaa' → 'bbb'"),
    ],
)
def test_anything_else_is_refused_and_changes_nothing(tmp_path, change, named):
    begun(tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(UserError, match="holds a run of another configuration") as error:
        reopen(tmp_path, changed(**change))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / CONFIG).read_bytes() == before


def test_all_refused_changes_are_listed(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match=r"config\.model\.num_layers: 2 → 4; config\.seed: 0 → 7"):
        reopen(tmp_path, changed(config__seed=7, config__model__num_layers=4, config__mesh__fsdp=2))


def test_another_kind_is_refused(tmp_path):
    Workdir(tmp_path, "tokenizer", RECORD)
    with pytest.raises(UserError, match=rf"{CONFIG}: holds 'tokenizer', wanted .* of kind 'lvm'"):
        reopen(tmp_path, RECORD)


def test_a_second_run_in_this_process_is_refused(tmp_path):
    first = Workdir(tmp_path, "lvm", RECORD)
    with pytest.raises(UserError, match=f"{first.path}: another run is using this workdir"):
        Workdir(tmp_path, "lvm", RECORD)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    script = (
        "import sys; from lvm.training.workdir import Workdir; "
        f"place = Workdir({str(tmp_path)!r}, 'lvm', {{'config': {{}}}}); "
        "print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another run is using this workdir"):
            Workdir(tmp_path, "lvm", {"config": {}})
        other.kill()  # even a killed run leaves no lock
    Workdir(tmp_path, "lvm", {"config": {}})


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}: not a model folder: {CONFIG} is missing; .* lvm"):
        read_record(tmp_path, "lvm")


def test_a_record_that_is_no_object_is_named(tmp_path):
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(UserError, match=rf"{CONFIG}: holds 'list', wanted"):
        read_record(tmp_path, "lvm")


def test_before_the_first_checkpoint_a_run_may_start_otherwise(tmp_path):
    Workdir(tmp_path, "lvm", RECORD)
    reopen(tmp_path, changed(config__model__num_layers=4))
    assert read_record(tmp_path, "lvm")["config"]["model"]["num_layers"] == 4


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    clip: float = 1.0  # a key that runs of yesterday didn't have


@pytest.mark.parametrize("clip", [1.0, 2.0])
def test_a_key_that_an_older_run_lacks_counts_as_its_default(tmp_path, clip):
    Workdir(tmp_path, "lvm", {"config": {"seed": 4}})
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / ".lock").unlink()
    record = {"config": to_json(Config(4, clip))}
    if clip == 1.0:
        Workdir(tmp_path, "lvm", record, config_class=Config)
        assert read_record(tmp_path, "lvm")["config"] == {"seed": 4, "clip": 1.0}
        return
    with pytest.raises(UserError, match=r"config\.clip: 1\.0 → 2\.0"):
        Workdir(tmp_path, "lvm", record, config_class=Config)


def test_a_key_that_an_older_run_has_and_nobody_knows_is_named(tmp_path):
    Workdir(tmp_path, "lvm", {"config": {"dropout": 0.1}})
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match=r"config\.json: config\.dropout: no such key"):
        Workdir(tmp_path, "lvm", {"config": to_json(Config())}, config_class=Config)
