"""`metrics.jsonl` holds each step once, whatever cut the run off."""

import sys
import types

import pytest

from lvm.common import files
from lvm.common.errors import UserError
from lvm.training import metrics
from lvm.training.metrics import FILENAME, MetricsWriter


def write(folder, start, steps):
    with MetricsWriter(folder, start) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


def steps(folder):
    return [line["step"] for line in metrics.read_metrics(folder)]


def test_lines_come_back_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert metrics.read_metrics(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def test_a_folder_without_metrics_has_no_lines(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("resumed", "kept"), [(0, []), (25, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])]
)
def test_a_resumed_run_drops_what_lies_beyond_its_step(tmp_path, resumed, kept):
    write(tmp_path, 0, [10, 20, 30])
    write(tmp_path, resumed, [resumed + 10])
    assert steps(tmp_path) == [*kept, resumed + 10]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 2.0})
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("rest", ['{"step": 30, "lo', '{"step": 30, "loss": 1.0}'])
def test_a_line_cut_off_by_a_kill_is_left_out_and_written_over(tmp_path, rest):
    write(tmp_path, 0, [10, 20])
    with open(tmp_path / FILENAME, "a") as file:
        file.write(rest)
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, 20, [30])
    assert (tmp_path / FILENAME).read_text().count("\n") == 3
    assert steps(tmp_path) == [10, 20, 30]


class FakeWandb(types.ModuleType):
    """As much of Weights & Biases as is used, and a list of what it was told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.told = []

    def init(self, **options):
        self.told.append(options)
        if options["project"] == "secret":
            raise self.Error("permission denied")
        return self

    def define_metric(self, name, step_metric):
        self.told.append((name, step_metric))

    def log(self, values):
        self.told.append(values)

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_is_told_all_under_one_id(tmp_path, wandb):
    files.write_json(tmp_path / "config.json", {"config": {"seed": 3}})
    for start in (0, 1):
        with MetricsWriter(tmp_path, start, "team/vision") as writer:
            writer.write(start + 1, {"loss": 2.0})
    first, second = (options for options in wandb.told if isinstance(options, dict) and "id" in options)
    assert first == second
    assert (first["entity"], first["project"], first["resume"]) == ("team", "vision", "allow")
    assert first["config"] == {"config": {"seed": 3}}
    assert first["name"] == tmp_path.name
    assert wandb.told.count(("*", "step")) == wandb.told.count("finished") == 2
    assert {"step": 2, "loss": 2.0} in wandb.told


def test_weights_and_biases_that_refuses_or_is_not_there_is_one_clear_line(tmp_path, wandb, monkeypatch):
    files.write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match=r"config\.loop\.wandb: secret: permission denied"):
        MetricsWriter(tmp_path, 0, "secret")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.loop\.wandb: vision: pip install wandb"):
        MetricsWriter(tmp_path, 0, "vision")
