"""Results of a sweep's runs: from their workdirs, and as rows of results.csv, with which another machine goes on."""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.claims import Claims
from lvm.common.errors import UserError
from lvm.scaling.manifest import Run, Sweep
from lvm.scaling.observations import PERPLEXITY, SCORE
from lvm.training.metrics import read_metrics

RESULTS = "results.csv"
FAILURE = "failure.json"  # in the workdir of a run that failed: {"reason": …, "exit_code": …}
DIVERGED = "diverged.json"  # in it too, written by the training loop
_COLUMNS = ("name", "budget", "params", "params_without_embedding", "tokens", "flops", "loss", "batch_size",
            "learning_rate", "steps")  # fmt: skip
_LOSS = "heldout_loss"
_SCORES = ("foreground_iou", "class_miou", "pixel_accuracy", "delta1")  # of a prompted task
_EXP_OF_MEAN = "exp_of_mean/"  # perplexity of a component
_POLL_S = 0.2
_LOCK = "results"  # the claim under which the table is written


@dataclasses.dataclass(frozen=True)
class RunState:
    """State of a run by its workdir.

    Attributes:
      step: of its last metrics; 0 before the first.
      loss: the held-out loss of the last step; None unless it is finished.
      failure: reason why it failed; "" if it did not.
    """

    step: int = 0
    loss: float | None = None
    failure: str = ""

    @property
    def is_settled(self) -> bool:
        return self.loss is not None or bool(self.failure)


def read_state(folder: epath.PathLike, run: Run) -> RunState:
    """State of a run of a sweep's folder."""
    workdir = epath.Path(folder) / run.workdir
    records = read_metrics(workdir)
    step = max((record["step"] for record in records), default=0)
    if failure := files.read_side_file(workdir / FAILURE):
        return RunState(step, failure=str(failure.get("reason", "unknown")))
    losses = [record[_LOSS] for record in records if record["step"] == run.steps and _LOSS in record]
    if step < run.steps or not losses:
        return RunState(step)
    if not 0 < losses[-1] < math.inf:
        return RunState(step, failure=f"{_LOSS} is {losses[-1]} at step {step}")
    return RunState(step, losses[-1])


def write_failure(folder: epath.PathLike, run: Run, reason: str, exit_code: int) -> None:
    """Records why a run failed; it is not run again until the record is removed."""
    workdir = epath.Path(folder) / run.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / FAILURE, {"reason": reason, "exit_code": exit_code})


def read_results(folder: epath.PathLike, sweep: Sweep) -> dict[str, dict[str, str]]:
    """Rows of results.csv by the name of their run; {} before the first.

    Raises:
      UserError: not a table of results, two rows of a run, a loss that is no positive number, a downstream metric that
        is no number, or a row of a run that differs from the plan's.
    """
    path = epath.Path(folder) / RESULTS
    if not path.exists():
        return {}
    reader = csv.reader(io.StringIO(path.read_text()))
    header = next(reader, [])
    if missing := [name for name in _COLUMNS if name not in header]:
        raise UserError(f"{path}: no column {missing[0]} in its first line; expected the results of a sweep")
    runs, rows = {run.name: run for run in sweep.runs}, dict[str, dict[str, str]]()
    for cells in reader:
        if len(cells) != len(header):
            raise UserError(f"{path}: line {reader.line_num}: {len(cells)} cells, expected {len(header)}")
        row = dict(zip(header, cells, strict=True))
        where = f"{path}: line {reader.line_num}: {row['name']}"
        if row["name"] in rows:
            raise UserError(f"{where}: has a second row")
        for name in ("loss", *(name for name in header if name.startswith((SCORE, PERPLEXITY)) and row[name])):
            if not math.isfinite(value := _to_number(row[name])) or (name == "loss" and value <= 0):
                raise UserError(f"{where}: {name}={row[name] or 'nothing'}; expected a number")
        for name in _COLUMNS if row["name"] in runs else ():
            planned = getattr(runs[row["name"]], name, None)
            if isinstance(planned, int | float) and _to_number(row[name]) != planned:
                raise UserError(f"{where}: {name}={row[name]}, but {planned} in the plan: results of another sweep")
        rows[row["name"]] = row
    return rows


def _to_number(cell: str) -> float:
    """NaN for what is no number."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def add_result(folder: epath.PathLike, sweep: Sweep, run: Run, loss: float, claims: Claims) -> None:
    """Adds a run's row to results.csv, in the order of the manifest: its bytes don't depend on who ran what when."""
    values: dict[str, Any] = {**dataclasses.asdict(run), "loss": loss}
    row = {name: repr(value) if isinstance(value, float) else str(value) for name, value in values.items()}
    row = {name: row[name] for name in _COLUMNS} | {
        name: repr(value) for name, value in read_downstream(folder, run).items()
    }
    while _LOCK in claims.busy() or not claims.acquire(_LOCK):  # other runners add theirs
        time.sleep(_POLL_S)
    try:
        rows = {**read_results(folder, sweep), run.name: row}
        order = {name: i for i, name in enumerate([run.name for run in sweep.runs])}
        downstream = sorted({name for row in rows.values() for name in row if name.startswith((SCORE, PERPLEXITY))})
        table = io.StringIO()
        writer = csv.DictWriter(table, [*_COLUMNS, *downstream], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: order.get(row["name"], len(order))))
        files.write_atomically(epath.Path(folder) / RESULTS, table.getvalue().encode())
    finally:
        claims.release(_LOCK)


def read_downstream(folder: epath.PathLike, run: Run) -> dict[str, float]:
    """Downstream scores and per-task perplexities of a run's evaluation."""
    results: Mapping[str, Any] = {}
    if run.evaluation:
        results = files.read_side_file(epath.Path(folder) / run.evaluation / "results.json")
    metrics: dict[str, float] = {}
    for evaluation, figures in results.get("figures", {}).items():
        for name, figure in figures.items():
            if figure["value"] is None:
                continue
            if name in _SCORES:
                metrics[f"{SCORE}{evaluation} {name}"] = figure["value"]
            elif name.startswith(_EXP_OF_MEAN):
                metrics[f"{PERPLEXITY}{name.removeprefix(_EXP_OF_MEAN)}"] = figure["value"]
    return metrics
