"""Runner and status of a sweep, with training replaced by a function that writes metrics."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re

import numpy as np
import pytest

from lvm.common.claims import Claims
from lvm.common.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_PREEMPTED, UserError
from lvm.scaling import runner
from lvm.scaling.manifest import FORMAT, Run, Sweep, write_sweep
from lvm.scaling.results import RESULTS, read_results, read_state
from lvm.scaling.runner import CLAIMS, run_sweep
from lvm.scaling.runs import read_runs
from lvm.scaling.status import sweep_status
from lvm.training import loop


class KilledError(BaseException):
    """Stands for the end of the runner's process."""


def make_run(name, **changes):
    return Run(name, f"runs/{name}", 100.0, 50.0, 1e4, 6e6, 10, budget=6e6, batch_size=2, **changes)


RUNS = (make_run("a"), make_run("b"), make_run("c", evaluation="evaluations/c"))
SWEEP = Sweep(FORMAT, RUNS)


class Training:
    """Replaces the supervised commands; `fail` names runs and `kill_at` counts commands until a kill."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.commands, self.fail, self.kill_at = folder, [], {}, None
        replacement = lambda runner, run, command: self._supervise(runner, run, command)  # noqa: E731
        monkeypatch.setattr(runner._Runner, "_supervise", replacement)

    def _supervise(self, runner, run, command):
        self.commands.append((command[1], run.name))
        workdir = self.folder / run.workdir
        if command[1] == "lvm.evaluate":
            self._maybe_kill()
            path = self.folder / run.evaluation / "results.json"
            path.parent.mkdir(parents=True)
            figures = {"class_miou": {"value": 0.25}, "psnr": {"value": 8.0}}
            perplexity = {"exp_of_mean/video": {"value": 2.5}, "mean_of_exp/video": {"value": 3.0}}
            path.write_text(json.dumps({"figures": {"segmentation": figures, "perplexity": perplexity}}))
            return EXIT_DONE
        workdir.mkdir(parents=True, exist_ok=True)
        if code := self.fail.get(run.name):
            if code != EXIT_PREEMPTED:
                runner._fail(run, "the loss is NaN", code)
            return code
        step = read_state(self.folder, run).step
        with open(workdir / "metrics.jsonl", "a") as file:
            while step < run.steps:
                step += 5
                loss = 2 + len(run.name) / step
                file.write(
                    json.dumps({"step": step, "loss": loss, "heldout_loss": loss, "tokens_per_second": 10}) + "\n"
                )
                file.flush()
                self._maybe_kill()
        return EXIT_DONE

    def _maybe_kill(self):
        if self.kill_at is not None:
            self.kill_at -= 1
            if self.kill_at < 0:
                raise KilledError


@pytest.fixture
def sweep(tmp_path):
    write_sweep(tmp_path, Sweep(FORMAT, RUNS))
    return tmp_path


def train_all(folder, monkeypatch, **options):
    training = Training(folder, monkeypatch)
    assert run_sweep(str(folder), **options) == EXIT_DONE
    return training.commands


def test_runner_trains_each_run_once(sweep, monkeypatch):
    commands = train_all(sweep, monkeypatch)
    assert commands == [("lvm.train", "a"), ("lvm.train", "b"), ("lvm.train", "c"), ("lvm.evaluate", "c")]
    assert train_all(sweep, monkeypatch) == []
    rows = read_results(sweep, SWEEP)
    assert [*rows] == ["a", "b", "c"]
    assert float(rows["a"]["loss"]) == 2.1
    assert rows["c"]["score/segmentation class_miou"] == "0.25"
    assert rows["c"]["perplexity/video"] == "2.5"
    assert rows["a"]["perplexity/video"] == ""
    assert not list((sweep / CLAIMS).iterdir())


@pytest.mark.parametrize("seed", range(8))
def test_killed_sweep_has_bytes_of_unbroken_one(tmp_path, monkeypatch, seed):
    rng, folders = random.Random(seed), [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        write_sweep(folder, Sweep(FORMAT, RUNS))
    train_all(folders[0], monkeypatch)
    for _ in range(3):
        training = Training(folders[1], monkeypatch)
        training.kill_at = rng.randrange(7)
        with contextlib.suppress(KilledError):
            run_sweep(str(folders[1]))
    train_all(folders[1], monkeypatch)
    for name in (RESULTS, "sweep.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_failed_run_stops_nothing(sweep, monkeypatch):
    training = Training(sweep, monkeypatch)
    training.fail = {"a": EXIT_DIVERGED}
    with pytest.raises(UserError, match=r"1 of 3 runs failed \(a: the loss is NaN\); --retry_failed"):
        run_sweep(str(sweep))
    assert [*read_results(sweep, SWEEP)] == ["b", "c"]
    assert json.loads((sweep / "runs/a/failure.json").read_text()) == {"reason": "the loss is NaN", "exit_code": 65}
    training.commands.clear()
    with pytest.raises(UserError, match="the loss is NaN"):
        run_sweep(str(sweep))
    assert training.commands == []
    (sweep / "runs/a" / loop.DIVERGED).write_text("{}")
    assert train_all(sweep, monkeypatch, retry_failed=True) == [("lvm.train", "a")]
    assert [*read_results(sweep, SWEEP)] == ["a", "b", "c"]
    assert read_runs(sweep)[0].name.tolist() == ["a", "b", "c"]


def test_failed_task_of_job_array_is_done(sweep, monkeypatch, caplog):
    training = Training(sweep, monkeypatch)
    training.fail = {"a": EXIT_DIVERGED}
    assert run_sweep(str(sweep), index=0) == EXIT_DONE
    assert "1 of 1 runs failed (a: the loss is NaN)" in caplog.text


def test_sweep_whose_runs_all_fail_is_one_line(sweep, monkeypatch):
    training = Training(sweep, monkeypatch)
    training.fail = dict.fromkeys("abc", 2)
    with pytest.raises(UserError, match=r"3 of 3 runs failed \(a: .*; b: .*; c: .*\)") as error:
        run_sweep(str(sweep))
    assert "\n" not in str(error.value)
    assert not (sweep / RESULTS).exists()


def test_preempted_runner_records_no_failure(sweep, monkeypatch):
    training = Training(sweep, monkeypatch)
    training.fail = {"b": EXIT_PREEMPTED}
    assert run_sweep(str(sweep)) == EXIT_PREEMPTED
    assert not (sweep / "runs/b/failure.json").exists()
    assert ("lvm.train", "b") in train_all(sweep, monkeypatch)


def test_runner_leaves_run_of_another_runner(sweep, monkeypatch, caplog):
    caplog.set_level("INFO")
    with Claims(sweep / CLAIMS) as other:
        assert other.acquire("a")
        commands = train_all(sweep, monkeypatch)
        assert ("lvm.train", "a") not in commands
        assert [*read_results(sweep, SWEEP)] == ["b", "c"]
        assert "1 runs are left to other runners: a" in caplog.text
    assert train_all(sweep, monkeypatch) == [("lvm.train", "a")]


def test_index_runs_its_task_alone(tmp_path, monkeypatch):
    branches = (make_run("b1", trunk="b", trunk_step=4), make_run("b2", trunk="b", trunk_step=8))
    write_sweep(tmp_path, Sweep(FORMAT, (RUNS[0], *branches, RUNS[1])))
    commands = train_all(tmp_path, monkeypatch, index=1)
    assert commands == [("lvm.train", name) for name in ("b", "b1", "b2")]
    with pytest.raises(UserError, match="--index=2: the sweep has tasks 0 to 1"):
        run_sweep(str(tmp_path), index=2)


def test_branch_waits_for_checkpoint_of_its_trunk(tmp_path, monkeypatch):
    write_sweep(tmp_path, Sweep(FORMAT, (make_run("b", trunk="a", trunk_step=4), RUNS[0])))
    with Claims(tmp_path / CLAIMS) as other:
        assert other.acquire("a")
        assert train_all(tmp_path, monkeypatch) == []
        (tmp_path / "runs/a/checksums").mkdir(parents=True)
        (tmp_path / "runs/a/checksums/4.json").write_text("{}")
        assert train_all(tmp_path, monkeypatch) == [("lvm.train", "b")]


def test_other_machine_goes_on_by_results_alone(sweep, tmp_path_factory, monkeypatch):
    training = Training(sweep, monkeypatch)
    training.fail = {"b": EXIT_DIVERGED}
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        run_sweep(str(sweep))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("sweep.json", RESULTS):
        (elsewhere / name).write_bytes((sweep / name).read_bytes())
    here, there = read_runs(sweep)[0], read_runs(elsewhere)[0]
    assert there.name.tolist() == here.name.tolist() == ["a", "c"]
    assert there.excluded == {"b": "not started"}
    for name in ("params", "tokens", "flops", "loss"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    np.testing.assert_equal(there.metrics, here.metrics)
    with pytest.raises(UserError, match="none of 3 runs is finished"):
        read_runs(elsewhere, "curve")
    assert train_all(elsewhere, monkeypatch)[0] == ("lvm.train", "b")
    assert [*read_results(elsewhere, SWEEP)] == ["a", "b", "c"]
    assert read_runs(elsewhere)[0].name.tolist() == ["a", "b", "c"]


def test_row_counts_whatever_is_left_of_its_workdir(sweep, monkeypatch):
    train_all(sweep, monkeypatch)
    (sweep / "runs/a/metrics.jsonl").write_text('{"step": 5, "loss": 3.0, "heldout_loss": 3.0}\n')
    (sweep / "runs/b/failure.json").write_text('{"reason": "out of memory", "exit_code": 1}')
    assert read_runs(sweep)[0].name.tolist() == ["a", "b", "c"]
    assert sweep_status(sweep)[0][-1] == "3 done"
    assert train_all(sweep, monkeypatch) == []
    assert read_runs(sweep, "curve")[0].excluded == {
        "a": "unfinished: step 5 of 10 here; results.csv has its last loss alone",
        "b": "failed: out of memory here; results.csv has its last loss alone",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("2.1,", ","), "line 2: a: loss=nothing"),
        (("2.1,", "low,"), "line 2: a: loss=low"),
        (("2.1,", "nan,"), "line 2: a: loss=nan"),
        (("2.1,", "-1,"), "line 2: a: loss=-1"),
        (("name,", "run,"), "no column name"),
        (("\nb,", "\na,"), "line 3: a: has a second row"),
        (("\nb,", "\n<<<<<<<\nb,"), "line 3: 1 cells, expected 12"),
        (("a,6000000.0,100.0", "a,6000000.0,999.0"), "line 2: a: params=999.0, but 100.0 in the plan"),
        (("0.25\n", "much\n"), "line 4: c: score/segmentation class_miou=much"),
    ],
)
def test_malformed_results_are_one_line(sweep, monkeypatch, change, words):
    train_all(sweep, monkeypatch)
    path = sweep / RESULTS
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    for command in (read_runs, sweep_status, run_sweep):
        with pytest.raises(UserError, match=re.escape(f"{RESULTS}: {words}")):
            command(str(sweep))


def test_claim_of_a_machine_that_is_gone_is_waited_for_and_taken_over(sweep, monkeypatch):
    monkeypatch.setattr(runner, "Claims", functools.partial(Claims, ttl_s=0.5))
    (sweep / CLAIMS).mkdir()
    owner = {"host": "elsewhere", "process": 1, "machine": "another boot", "id": "x"}
    (sweep / CLAIMS / "b.0").write_text(json.dumps(owner))
    os.utime(sweep / CLAIMS / "b.0", (0, 0))
    assert "running" not in sweep_status(sweep)[0][-1]
    assert train_all(sweep, monkeypatch, poll_s=0.1)[-1] == ("lvm.train", "b")
    assert [*read_results(sweep, SWEEP)] == ["a", "b", "c"]


def test_failure_has_the_last_attempts_reason(sweep, monkeypatch):
    run = RUNS[0]
    (sweep / run.workdir).mkdir(parents=True)
    (sweep / run.workdir / "train.log").write_text("error: of an attempt before\n")
    with Claims(sweep / CLAIMS) as claims:
        process = runner._Runner(str(sweep), SWEEP, claims, 0)
        process._supervise(run, ("-c", "import sys; sys.exit(3)"))
        assert process.failures == {"a": "exit code 3"}
        process._supervise(run, ("-c", "import sys; print('error: new', file=sys.stderr); sys.exit(3)"))
        assert process.failures == {"a": "new"}


def test_status_has_state_rate_and_time_left(sweep, monkeypatch):
    training = Training(sweep, monkeypatch)
    training.fail = {"b": EXIT_DIVERGED}
    with pytest.raises(UserError):
        run_sweep(str(sweep))
    runs = (*RUNS, make_run("d"), make_run("e"), make_run("f"))
    write_sweep(sweep, Sweep(FORMAT, runs))
    for name in "de":
        (sweep / "runs" / name).mkdir()
        line = json.dumps({"step": 5, "loss": 3.0, "tokens_per_second": 100.0})
        (sweep / "runs" / name / "metrics.jsonl").write_text(line + "\n")
    with Claims(sweep / CLAIMS) as other:
        assert other.acquire("d")
        lines, is_settled = sweep_status(sweep)
    states = [line.split()[1] for line in lines[1:-1]]
    assert states == ["done", "failed", "done", "running", "waiting", "waiting"]
    assert lines[2].endswith("the loss is NaN")
    assert lines[4].split()[2:] == ["5/10", "(3.0000)", "100", "50s"]
    assert lines[-1].startswith("2 done, 1 failed, 1 running, 2 waiting; 1.2e+07 FLOPs left, 6e+04 FLOP/s, 3m20s")
    assert not is_settled


def test_run_of_nonfinite_loss_has_failed(sweep):
    workdir = sweep / "runs" / "a"
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text('{"step": 10, "heldout_loss": NaN}\n')
    assert read_state(sweep, RUNS[0]).failure == "heldout_loss is nan at step 10"
    assert read_state(sweep, dataclasses.replace(RUNS[0], steps=20)).failure == ""
