"""Runs of a sweep: finished ones are rows, others have a reason; bad manifests are named."""

import json

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.scaling.manifest import Run, Sweep, read_sweep, write_sweep
from lvm.scaling.runs import read_runs
from tests.lvm.sweeps import isoflop_rows, write_manifest
from tests.lvm.sweeps import write_sweep as make_sweep

ROWS = isoflop_rows(budgets=np.array([1e18, 1e19]), sizes=2)


def test_sweep_is_read_as_written(tmp_path):
    runs = (Run("a", "runs/a", 1e6, 9e5, 1e8, 6e14, 10, arguments=("--config.seed=1",)), Run("b", "b", 1, 1, 1, 1, 1))
    write_sweep(tmp_path, Sweep(1, runs))
    assert read_sweep(tmp_path) == Sweep(1, runs)


def test_finished_runs_are_rows(tmp_path):
    make_sweep(tmp_path, ROWS)
    rows, warnings = read_runs(tmp_path)
    for name in ("params", "tokens", "flops", "loss"):
        np.testing.assert_allclose(getattr(rows, name), getattr(ROWS, name))
    assert rows.name.tolist() == ["run-0", "run-1", "run-2", "run-3"]
    assert (rows.excluded, warnings) == ({}, [])
    np.testing.assert_allclose(read_runs(tmp_path, count_embedding=False)[0].params, ROWS.params / 2)


def test_curve_has_tokens_and_flops_up_to_each_step(tmp_path):
    make_sweep(tmp_path, ROWS)
    rows, _ = read_runs(tmp_path, "curve")
    assert rows.name[:2].tolist() == ["run-0@50", "run-0@100"]
    np.testing.assert_allclose(rows.tokens, np.outer(ROWS.tokens, [0.5, 1]).ravel())
    np.testing.assert_allclose(rows.flops, np.outer(ROWS.flops, [0.5, 1]).ravel())
    assert rows.run.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_unfinished_runs_have_a_reason(tmp_path):
    runs = make_sweep(tmp_path, ROWS)
    (tmp_path / "run-0" / "failure.json").write_text(json.dumps({"reason": "out of memory"}))
    (tmp_path / "run-1" / "metrics.jsonl").write_text('{"step": 30, "heldout_loss": 3.0}\n')
    (tmp_path / "run-2" / "metrics.jsonl").unlink()
    rows, warnings = read_runs(tmp_path)
    assert rows.name.tolist() == ["run-3"]
    assert rows.excluded == {
        "run-0": "failed: out of memory",
        "run-1": "unfinished: step 30 of 100",
        "run-2": "not started",
    }
    (warning,) = warnings
    assert "1e+18" in warning
    assert "run-0: failed: out of memory" in warning
    (tmp_path / "run-3" / "metrics.jsonl").write_text('{"step": 100, "heldout_loss": NaN}\n')
    with pytest.raises(UserError, match="none of 4 runs is finished"):
        read_runs(tmp_path)
    write_manifest(tmp_path, [])
    with pytest.raises(UserError, match="none of 0 runs"):
        read_runs(tmp_path)
    assert len(runs) == 4


def test_evaluations_give_downstream_metrics(tmp_path):
    runs = make_sweep(tmp_path, ROWS)
    runs[1]["evaluation"] = "run-1/evaluation"
    write_manifest(tmp_path, runs)
    (tmp_path / "run-1" / "evaluation").mkdir()
    results = {
        "figures": {
            "segmentation": {"foreground_iou": {"value": 0.7}, "psnr": {"value": 9.0}, "class_miou": {"value": None}},
            "perplexity": {"exp_of_mean/depth": {"value": 4.0}},
        }
    }
    (tmp_path / "run-1" / "evaluation" / "results.json").write_text(json.dumps(results))
    rows, _ = read_runs(tmp_path)
    np.testing.assert_array_equal(rows.metrics["score/segmentation foreground_iou"], [np.nan, 0.7, np.nan, np.nan])
    np.testing.assert_array_equal(rows.metrics["perplexity/depth"], [np.nan, 4.0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": -1.0}, "params=-1"),
        ({"step": 3}, "step"),
        ({"name": "run-1"}, "'run-1' is the name of 2 runs"),
        ({"steps": "many"}, "steps"),
    ],
)
def test_manifest_rejects_nonsense(tmp_path, change, words):
    runs = make_sweep(tmp_path, ROWS)
    runs[0] |= change
    write_manifest(tmp_path, runs)
    with pytest.raises(UserError, match=words) as error:
        read_sweep(tmp_path)
    assert "sweep.json" in str(error.value)


def test_manifest_that_is_missing_or_of_another_format(tmp_path):
    with pytest.raises(UserError, match=r"no sweep\.json"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match="list of runs"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 2, "runs": []}')
    with pytest.raises(UserError, match="format=2"):
        read_sweep(tmp_path)
