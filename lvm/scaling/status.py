"""Status of a sweep: a row for each run with its state, rate and time left."""

import dataclasses

from etils import epath

from lvm.common import files
from lvm.common.claims import Claims, late_claims
from lvm.common.logging import duration
from lvm.scaling.manifest import Run, read_sweep
from lvm.scaling.results import read_results, read_state
from lvm.scaling.runner import CLAIMS
from lvm.scaling.table import format_table
from lvm.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class _Row:
    run: Run
    state: str  # done, failed, running, or waiting
    step: int
    loss: str
    note: str = ""
    tokens_per_second: float = 0.0  # of a running one; 0 if unknown

    @property
    def flops_left(self) -> float:
        """Of its own steps; a failed run is not continued."""
        begun = max(self.step, self.run.trunk_step)
        return self.run.flops * (1 - begun / self.run.steps) if self.state in ("running", "waiting") else 0.0

    @property
    def flops_per_second(self) -> float:
        return self.tokens_per_second * self.run.flops / self.run.tokens

    def cells(self) -> tuple[str, ...]:
        rate, left = "", ""
        if self.tokens_per_second:
            rate = f"{self.tokens_per_second:,.0f}"
            left = duration(self.flops_left / self.flops_per_second)
        return self.run.name, self.state, f"{self.step}/{self.run.steps}", self.loss, rate, left, self.note


def sweep_status(folder: epath.PathLike) -> tuple[list[str], bool]:
    """Lines of a table of a sweep's runs, and True once all are done or have failed.

    Raises:
      UserError: no manifest.
    """
    sweep = read_sweep(folder)
    recorded = read_results(folder, sweep)
    claims = epath.Path(folder) / CLAIMS
    busy = Claims(claims).busy() - set(late_claims(claims)[1])

    def read_row(run: Run) -> _Row:
        if run.name in recorded:
            return _Row(run, "done", run.steps, f"{float(recorded[run.name]['loss']):.4f}")
        state = read_state(folder, run)
        if state.failure:
            return _Row(run, "failed", state.step, "", state.failure)
        last = (read_metrics(epath.Path(folder) / run.workdir) or [{}])[-1]
        loss = f"({last['loss']:.4f})" if "loss" in last else ""  # of training
        if run.name not in busy:
            return _Row(run, "waiting", state.step, loss, "interrupted" if state.step else "")
        return _Row(run, "running", state.step, loss, tokens_per_second=last.get("tokens_per_second", 0.0))

    rows = list(files.map_concurrently(read_row, sweep.runs))
    header = ("run", "state", "steps", "loss", "tokens/s", "left", "")
    lines = format_table(header, [row.cells() for row in rows])
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "running", "waiting")}
    left, rate = sum(row.flops_left for row in rows), sum(row.flops_per_second for row in rows)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if left:
        summary += f"; {left:.3g} FLOPs left"
        summary += f", {rate:.3g} FLOP/s, {duration(left / rate)}" if rate else ""
    return [*lines, summary], not (counts["running"] or counts["waiting"])
