"""Workdirs: record, resume checks and lock."""

import dataclasses
import os
import subprocess
import sys

import pytest

import lvm
from lvm.common import files
from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.convert import convert
from lvm.interop import models
from lvm.training.workdir import CONFIG, Workdir, check_branch, read_record
from tests.commands import ROOT
from tests.lvm.small_models import assert_same_tensors, small_model

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


def start_run(folder):
    """A run that has saved a checkpoint."""
    Workdir(folder, "lvm", RECORD)
    (folder / "checkpoints" / "10").mkdir(parents=True)


def reopen(folder, record, kind="lvm"):
    """Opens a workdir as another process would, without the lock that this one still holds."""
    (folder / ".lock").unlink()
    return Workdir(folder, kind, record)


def test_workdir_writes_its_record(tmp_path):
    workdir = Workdir(tmp_path / "runs" / "one", "lvm", RECORD)
    header = {"version": 2, "lvm_version": lvm.__version__, "kind": "lvm"}
    assert read_record(workdir.path, "lvm") == {**header, **files.as_json(RECORD)}


def test_same_configuration_reopens_workdir(tmp_path):
    Workdir(tmp_path, "lvm", RECORD)
    before = (tmp_path / CONFIG).read_bytes()
    reopen(tmp_path, RECORD)
    assert (tmp_path / CONFIG).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config__mesh__fsdp": 8}, "config.mesh.fsdp: 1 → 8"),
        ({"config__model__remat": "full"}, "config.model.remat: 'none' → 'full'"),
        ({"config__loop__total_steps": 200}, "config.loop.total_steps: 100 → 200"),
        ({"config__loop__log_every": 1}, "config.loop.log_every: 10 → 1"),
        ({"config__tokenizer": "folder"}, "config.tokenizer: '' → 'folder'"),
    ],
)
def test_harmless_changes_are_accepted_and_logged(tmp_path, caplog, change, message):
    start_run(tmp_path)
    reopen(tmp_path, changed(**change))
    assert f"resuming with a changed {message}" in caplog.text
    assert read_record(tmp_path, "lvm")["config"] == changed(**change)["config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config__seed": 1}, "config.seed: 0 → 1"),
        ({"config__model__num_layers": 3}, "config.model.num_layers: 2 → 3"),
        ({"config__sizes": [1, 3]}, "config.sizes: [1, 2] → [1, 3]"),
        ({"config__new": 5}, "config.new: None → 5"),
        ({"stores": ["222"]}, "stores: ['111'] → ['222']"),
        ({"tokenizer__weights": "bbb"}, "tokenizer.weights: 'aaa' → 'bbb'"),
    ],
)
def test_other_changes_are_refused_and_write_nothing(tmp_path, change, message):
    start_run(tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(UserError, match="holds a run of another configuration") as error:
        reopen(tmp_path, changed(**change))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / CONFIG).read_bytes() == before


def test_refusal_lists_all_changes(tmp_path):
    start_run(tmp_path)
    with pytest.raises(UserError, match=r"config\.model\.num_layers: 2 → 4; config\.seed: 0 → 7"):
        reopen(tmp_path, changed(config__seed=7, config__model__num_layers=4, config__mesh__fsdp=2))


def test_other_kind_is_refused(tmp_path):
    Workdir(tmp_path, "tokenizer", RECORD)
    with pytest.raises(UserError, match=rf"{CONFIG}: holds 'tokenizer', expected .* of kind 'lvm'"):
        reopen(tmp_path, RECORD)


def test_second_run_in_process_is_refused(tmp_path):
    first = Workdir(tmp_path, "lvm", RECORD)
    with pytest.raises(UserError, match=f"{first.path}: another run is using this workdir"):
        Workdir(tmp_path, "lvm", RECORD)


def test_second_process_is_refused_while_first_lives(tmp_path):
    script = (
        "import sys; from lvm.training.workdir import Workdir; "
        f"workdir = Workdir({str(tmp_path)!r}, 'lvm', {{'config': {{}}}}); "
        "print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another run is using this workdir"):
            Workdir(tmp_path, "lvm", {"config": {}})
        other.kill()  # a killed run leaves no lock
    Workdir(tmp_path, "lvm", {"config": {}})


def test_read_record_names_missing_file(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}: not a model folder: {CONFIG} is missing; .* lvm"):
        read_record(tmp_path, "lvm")


def test_read_record_refuses_json_list(tmp_path):
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(UserError, match=rf"{CONFIG}: holds 'list', expected"):
        read_record(tmp_path, "lvm")


def test_changes_are_free_before_first_checkpoint(tmp_path):
    Workdir(tmp_path, "lvm", RECORD)
    reopen(tmp_path, changed(config__model__num_layers=4))
    assert read_record(tmp_path, "lvm")["config"]["model"]["num_layers"] == 4


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    clip: float = 1.0  # a key that an older release lacked


@pytest.mark.parametrize("clip", [1.0, 2.0])
def test_missing_old_key_counts_as_default(tmp_path, clip):
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


def test_unknown_old_key_is_named(tmp_path):
    Workdir(tmp_path, "lvm", {"config": {"dropout": 0.1}})
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match=r"config\.json: config\.dropout: no such key"):
        Workdir(tmp_path, "lvm", {"config": to_json(Config())}, config_class=Config)


def write_old_record(folder, kind="lvm", **changes):
    """Makes the record one of the release before `components`."""
    record = files.read_json(folder / CONFIG)
    record["config"]["data"] = {"sources": [{"store": "s"}]}
    record = {key: value for key, value in record.items() if key != "lvm_version"}
    files.write_json(folder / CONFIG, {**record, "version": 1, "kind": kind, **changes})


@pytest.mark.parametrize(("kind", "command"), [("lvm", "lvm convert"), ("tokenizer", "python -m tokenizer convert")])
def test_workdir_of_older_release_is_refused(tmp_path, kind, command):
    start_run(tmp_path)
    write_old_record(tmp_path, kind)
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(UserError, match=f"{tmp_path / CONFIG}: .* {command} {tmp_path} NEW --to=orbax") as error:
        reopen(tmp_path, RECORD, kind)
    assert "\n" not in str(error.value)
    assert "use a new --workdir" in str(error.value)
    assert (tmp_path / CONFIG).read_bytes() == before


def test_workdir_of_older_release_converts(tmp_path):
    expected = small_model()
    models.write(tmp_path / "old", expected, "orbax")
    write_old_record(tmp_path / "old", converted=False)
    convert(str(tmp_path / "old"), str(tmp_path / "new"), "orbax")
    converted = models.read(tmp_path / "new")
    assert_same_tensors(converted, expected)
    assert converted.record["version"] == 2
    assert set(converted.record["config"]) == {"model"}  # config.data had another meaning


def test_changed_lvm_version_is_logged(tmp_path, caplog):
    start_run(tmp_path)
    record = files.read_json(tmp_path / CONFIG)
    files.write_json(tmp_path / CONFIG, {**record, "lvm_version": "0.0.9"})
    reopen(tmp_path, RECORD)
    assert f"resuming with a changed lvm_version: '0.0.9' → '{lvm.__version__}'" in caplog.text


def test_branch_may_differ_in_schedule_alone(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Optimizer:
        learning_rate: float = 1.0
        schedule: str = "wsd"
        b1: float = 0.9

    @dataclasses.dataclass(frozen=True)
    class Config:
        optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

    def record(**changes):
        return {"config": to_json(Config(Optimizer(**changes)))}

    Workdir(tmp_path, "lvm", record())
    check_branch(tmp_path, "lvm", record(learning_rate=0.5, schedule="cosine"), Config)
    with pytest.raises(UserError, match=r"config.branch_from: .* \(config.optimizer.b1: 0.9 → 0.8\)"):
        check_branch(tmp_path, "lvm", record(b1=0.8), Config)
    with pytest.raises(UserError, match=r"none: doesn't exist; expected a workdir of lvm"):
        check_branch(tmp_path / "none", "lvm", record(), Config)
