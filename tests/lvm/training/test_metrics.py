"""`metrics.jsonl` has each step once, after any interruption; Weights & Biases."""

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


def test_read_metrics_returns_lines_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert metrics.read_metrics(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def test_read_metrics_of_empty_folder_is_empty(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize(("resumed", "kept"), [(0, []), (25, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])])
def test_writer_drops_lines_after_start(tmp_path, resumed, kept):
    write(tmp_path, 0, [10, 20, 30])
    write(tmp_path, resumed, [resumed + 10])
    assert steps(tmp_path) == [*kept, resumed + 10]


def test_writer_flushes_each_line(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 2.0})
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("rest", ['{"step": 30, "lo', '{"step": 30, "loss": 1.0}'])
def test_truncated_last_line_is_dropped(tmp_path, rest):
    write(tmp_path, 0, [10, 20])
    with open(tmp_path / FILENAME, "a") as file:
        file.write(rest)
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, 20, [30])
    assert (tmp_path / FILENAME).read_text().count("\n") == 3
    assert steps(tmp_path) == [10, 20, 30]


def test_lines_that_are_no_metrics_are_named_and_dropped(tmp_path, caplog):
    good = b'{"step": 10, "loss": 1.0}'
    bad = [b"\0" * 20, b"", b"{", b"null", b'{"loss": 1.0}', b'{"step": null}', b"\xff\xfe"]
    (tmp_path / FILENAME).write_bytes(b"\n".join([good, *bad, good.replace(b"10", b"20"), b""]))
    assert steps(tmp_path) == [10, 20]
    assert [f"{FILENAME}:{number}:" in caplog.text for number in range(1, 10)] == [False, *[True] * 7, False]
    write(tmp_path, 20, [30])
    assert steps(tmp_path) == [10, 20, 30]
    assert (tmp_path / FILENAME).read_text().count("\n") == 3


class FakeWandb(types.ModuleType):
    """A stand-in for the wandb module that records its calls."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(options)
        if options["project"] == "secret":
            raise self.Error("permission denied")
        return self

    def define_metric(self, name, step_metric):
        self.calls.append((name, step_metric))

    def log(self, values):
        self.calls.append(values)

    def finish(self):
        self.calls.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_all_values_under_one_id(tmp_path, wandb):
    files.write_json(tmp_path / "config.json", {"config": {"seed": 3}})
    for start in (0, 1):
        with MetricsWriter(tmp_path, start, "team/vision") as writer:
            writer.write(start + 1, {"loss": 2.0})
    first, second = (options for options in wandb.calls if isinstance(options, dict) and "id" in options)
    assert first == second
    assert (first["entity"], first["project"], first["resume"]) == ("team", "vision", "allow")
    assert first["config"] == {"config": {"seed": 3}}
    assert first["name"] == tmp_path.name
    assert wandb.calls.count(("*", "step")) == wandb.calls.count("finished") == 2
    assert {"step": 2, "loss": 2.0} in wandb.calls


def test_wandb_refused_or_missing_is_user_error(tmp_path, wandb, monkeypatch):
    files.write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match=r"config\.loop\.wandb: secret: permission denied"):
        MetricsWriter(tmp_path, 0, "secret")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.loop\.wandb: vision: pip install wandb"):
        MetricsWriter(tmp_path, 0, "vision")
