"""Runner of a sweep: trains what isn't done, one run after another, beside other runners of the same sweep."""

import os
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from etils import epath

from lvm.common import files, progress
from lvm.common.claims import Claims
from lvm.common.errors import EXIT_DONE, EXIT_PREEMPTED, UserError
from lvm.common.logging import log_info, log_warning
from lvm.launch.local import Supervisor
from lvm.scaling.manifest import Run, Sweep, read_sweep
from lvm.scaling.results import DIVERGED, FAILURE, add_result, read_results, read_state, write_failure

CLAIMS = "claims"  # folder: a claim for each run in progress
_LOG = "train.log"
_GRACE_S = 60.0  # from SIGTERM to SIGKILL
_POLL_S = 5.0


def run_sweep(
    folder: str, index: int | None = None, max_restarts: int = 3, retry_failed: bool = False, poll_s: float = _POLL_S
) -> int:
    """Trains the runs of a sweep that are neither done nor failed nor another runner's.

    Args:
      folder: with the manifest.
      index: runs only this task (`Sweep.tasks`), and waits for those of its runs that another runner has.
      max_restarts: of each run, without a new checkpoint in between.
      retry_failed: removes the records of failures first.
      poll_s: between looks at a run that another runner has.

    Returns:
      The exit code: 0, or 75 after SIGTERM.

    Raises:
      UserError: no manifest, no such task, or, without an index, at the end a run has failed.
    """
    sweep = read_sweep(folder)
    tasks = sweep.tasks()
    if index is not None and not 0 <= index < len(tasks):
        raise UserError(f"--index={index}: the sweep has tasks 0 to {len(tasks) - 1}")
    runs = [run for task in tasks for run in task] if index is None else [*tasks[index]]
    if retry_failed:
        for run in runs:
            for name in (FAILURE, DIVERGED):
                (epath.Path(folder) / run.workdir / name).unlink(missing_ok=True)
    with Claims(epath.Path(folder) / CLAIMS) as claims:
        runner = _Runner(folder, sweep, claims, max_restarts)
        while open_runs := runner.open_runs(runs):
            claimed = runner.claim(open_runs)
            if claimed is not None:
                try:
                    if (code := runner.train(claimed)) == EXIT_PREEMPTED:
                        return code
                finally:
                    claims.release(claimed.name)
            elif not (left := runner.open_runs(runs)):
                break
            elif index is None and not any(claims.is_unproven(run.name) for run in left):
                log_info(f"{len(left)} runs are left to other runners: {_listed(left)}")
                break
            else:
                time.sleep(poll_s)
    failed = [run for run in runs if runner.failures.get(run.name)]
    if failed:
        reasons = "; ".join(f"{run.name}: {runner.failures[run.name]}" for run in failed[:3])
        message = f"{len(failed)} of {len(runs)} runs failed ({reasons}{'; …' if len(failed) > 3 else ''})"
        if index is None:
            raise UserError(f"{message}; --retry_failed runs them again")
        log_warning(message)  # a scheduler would end the other tasks, or repeat this one, for another exit code
    return EXIT_DONE


class _Runner:
    """The runs of one process. `failures` has the reason of each run that is known to have failed."""

    def __init__(self, folder: str, sweep: Sweep, claims: Claims, max_restarts: int):
        self._folder, self._sweep, self._claims = folder, sweep, claims
        self._max_restarts = max_restarts
        self._runs = {run.name: run for run in sweep.runs}
        self._settled: set[str] = set()
        self.failures: dict[str, str] = {}

    def open_runs(self, runs: Sequence[Run]) -> list[Run]:
        """Those not known to be done or to have failed."""
        return [run for run in runs if run.name not in self._settled]

    def claim(self, runs: Sequence[Run]) -> Run | None:
        """Claims the first run that can be trained now; None if there is none."""
        busy = self._claims.busy()
        recorded = read_results(self._folder, self._sweep)
        for run in runs:
            if run.name in busy or self._check_settled(run, run.name in recorded):
                continue
            if self._waits_for_trunk(run, busy, run.trunk in recorded) or not self._claims.acquire(run.name):
                continue
            if not self._check_settled(
                run, run.name in read_results(self._folder, self._sweep)
            ):  # another may just have done it
                return run
            self._claims.release(run.name)
        return None

    def _waits_for_trunk(self, run: Run, busy: set[str], is_trunk_recorded: bool) -> bool:
        """True if a run's trunk has yet to save the checkpoint that the run begins with."""
        if not run.trunk:
            return False
        trunk = self._runs[run.trunk]
        if (epath.Path(self._folder) / trunk.workdir / "checksums" / f"{run.trunk_step}.json").exists():
            return False
        return run.trunk in busy or not (is_trunk_recorded or read_state(self._folder, trunk).is_settled)

    def _check_settled(self, run: Run, is_recorded: bool) -> bool:
        # A run that is finished without a row was killed before its evaluation or its row: it is run again, quickly.
        failure = "" if is_recorded else read_state(self._folder, run).failure
        if failure:
            self.failures[run.name] = failure
        if is_recorded or failure:
            self._settled.add(run.name)
            return True
        return False

    def train(self, run: Run) -> int:
        """Trains and evaluates a run, and records its result or why there is none."""
        root = epath.Path(self._folder)
        workdir = root / run.workdir
        number = list(self._runs).index(run.name) + 1
        log_info(f"run {number} of {len(self._runs)}: {run.name}, {run.steps} steps")
        branch = [f"--config.branch_from={root / self._runs[run.trunk].workdir}@{run.trunk_step}"] if run.trunk else []
        command = ("-m", "lvm.train", *run.arguments, *branch, f"--workdir={workdir}")
        code = self._supervise(run, command)
        if code == EXIT_DONE and run.evaluation:
            output = (f"--model={workdir}", f"--out={root / run.evaluation}")
            code = self._supervise(run, ("-m", "lvm.evaluate", *run.evaluation_arguments, *output))
        if code == EXIT_PREEMPTED:
            return code
        if code == EXIT_DONE:
            state = read_state(self._folder, run)
            if state.loss is not None:
                add_result(self._folder, self._sweep, run, state.loss, self._claims)
            else:
                self._fail(run, state.failure or f"no held-out loss at step {run.steps}", code)
        self._settled.add(run.name)
        return EXIT_DONE

    def _supervise(self, run: Run, command: Sequence[str]) -> int:
        """Runs a command to its end; the exit code is 75 if this process was told to end, and a failure is recorded."""
        workdir = epath.Path(self._folder) / run.workdir
        with _open_log(workdir) as log:
            start = log.seek(0, os.SEEK_END)  # of this attempt
            supervisor = Supervisor(command, 1, self._max_restarts, _GRACE_S, lambda: progress.read(workdir), log=log)
            code = supervisor.run()
            if supervisor.terminated:
                return EXIT_PREEMPTED
            if code != EXIT_DONE:
                log.seek(start)
                errors = [line for line in log if line.startswith("error: ")]
                reason = errors[-1].removeprefix("error: ").strip() if errors else f"exit code {code}"
                self._fail(run, reason, code)
            return code

    def _fail(self, run: Run, reason: str, code: int) -> None:
        log_warning(f"{run.name} failed: {reason}")
        self.failures[run.name] = reason
        write_failure(self._folder, run, reason, code)


def _open_log(workdir: epath.Path) -> IO[str]:
    """The log of a run, to read and append; a temporary one where the workdir is remote."""
    if files.is_remote(workdir):
        return tempfile.TemporaryFile("w+", encoding="utf-8")
    workdir.mkdir(parents=True, exist_ok=True)
    return open(os.fspath(workdir / _LOG), "a+", encoding="utf-8")


def _listed(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs[:3]) + (" …" if len(runs) > 3 else "")
