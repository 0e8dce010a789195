"""Finished runs of a sweep as observations.

A run is finished when results.csv has its row, whoever trained it, or its metrics reach its last step with a held-out
loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.scaling.manifest import Run, Sweep, read_sweep
from lvm.scaling.observations import PERPLEXITY, SCORE, Observations
from lvm.scaling.results import DIVERGED, FAILURE, RESULTS, read_downstream, read_results
from lvm.training.metrics import read_metrics

POINTS = ("final", "curve")
_LOSS = "heldout_loss"


def read_runs(
    folder: epath.PathLike, points: str = "final", count_embedding: bool = True
) -> tuple[Observations, list[str]]:
    """The finished runs of a sweep, and a warning for each compute budget without any.

    Args:
      folder: with the manifest.
      points: "final": the last held-out loss of a run; "curve": all of them, each with the tokens and FLOPs up to its
        step, of runs whose workdirs are here. Earlier ones are too high where the learning rate had not decayed yet.
      count_embedding: N includes embedding and output projection.

    Raises:
      UserError: no run is finished, or the manifest is none.
    """
    root, sweep = epath.Path(folder), read_sweep(folder)
    recorded = read_results(folder, sweep)
    rows: list[dict[str, Any]] = []
    excluded: dict[str, str] = {}
    for number, (run, (losses, problem)) in enumerate(
        zip(sweep.runs, files.map_concurrently(lambda run: _read_losses(root, run), sweep.runs), strict=True)
    ):
        if points == "final" and run.name in recorded:
            losses, metrics = _recorded(run, recorded[run.name])
        elif problem:
            excluded[run.name] = (
                f"{problem} here; {RESULTS} has its last loss alone" if run.name in recorded else problem
            )
            continue
        else:
            metrics = read_downstream(root, run)
        for step, loss in losses if points == "curve" else losses[-1:]:
            share = step / run.steps
            rows.append(
                {
                    "name": run.name if points == "final" else f"{run.name}@{step}",
                    "run": number,
                    "params": run.params if count_embedding else run.params_without_embedding,
                    "tokens": run.tokens * share,
                    "flops": run.flops * share,
                    "loss": loss,
                    "metrics": metrics if step == run.steps else {},
                }
            )
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(excluded.items())[:3])
        raise UserError(f"{folder}: none of {len(sweep.runs)} runs is finished ({reasons})")
    names = sorted({name for row in rows for name in row["metrics"]})
    arrays = {key: np.array([row[key] for row in rows]) for key in ("name", "run", "params", "tokens", "flops", "loss")}
    columns = {name: np.array([row["metrics"].get(name, math.nan) for row in rows]) for name in names}
    return Observations(**arrays, metrics=columns, excluded=excluded), _empty_budgets(sweep, excluded)


def _read_losses(root: epath.Path, run: Run) -> tuple[list[tuple[int, float]], str]:
    """(step, held-out loss) by step, and why the run isn't finished, "" if it is."""
    workdir = root / run.workdir
    for name in (FAILURE, DIVERGED):
        if (workdir / name).exists():
            failure = files.read_json(workdir / name)
            return [], f"failed: {failure.get('reason', 'diverged') if isinstance(failure, dict) else failure}"
    records = read_metrics(workdir)
    if not records:
        return [], "not started"
    last = max(record["step"] for record in records)
    if last < run.steps:
        return [], f"unfinished: step {last} of {run.steps}"
    losses = {record["step"]: record[_LOSS] for record in records if _LOSS in record}
    if run.steps not in losses:
        return [], f"no {_LOSS} at its last step, {run.steps}"
    if bad := [step for step, loss in losses.items() if not (0 < loss < math.inf)]:
        return [], f"failed: {_LOSS} is {losses[bad[0]]} at step {bad[0]}"
    return sorted(losses.items()), ""


def _recorded(run: Run, row: Mapping[str, str]) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Loss of the last step and downstream metrics by a row of results.csv."""
    metrics = {name: float(cell) for name, cell in row.items() if cell and name.startswith((SCORE, PERPLEXITY))}
    return [(run.steps, float(row["loss"]))], metrics


def _empty_budgets(sweep: Sweep, excluded: Mapping[str, str]) -> list[str]:
    flops = np.array([run.flops for run in sweep.runs])
    ones = np.ones(len(flops))
    numbers = Observations(ones, ones, flops, ones, np.arange(len(flops)), np.arange(len(flops))).budgets()
    warnings = []
    for number in np.unique(numbers):
        runs = [sweep.runs[i] for i in np.flatnonzero(numbers == number)]
        if all(run.name in excluded for run in runs):
            first = runs[0].name
            warnings.append(
                f"budget {runs[0].flops:.3g} FLOPs: none of its {len(runs)} runs is finished "
                f"({first}: {excluded[first]})"
            )
    return warnings
