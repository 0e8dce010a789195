"""Goodput and badput: a run's wall time by cause, over all of its processes from the first start on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.logging import duration

FILENAME = "goodput.json"
# Causes of badput. `steps` is what is left: time of steps that were kept, their devices at work.
DOWN = "down"  # between two processes
START = "start"  # imports, joining the other processes, building the model
INDEX = "index"  # opening stores
COMPILE, RESTORE, EVALUATION, PICTURES, SAVE = "compile", "restore", "evaluation", "pictures", "save"
INPUT = "input"  # devices idle for lack of a batch
HOST = "host"  # devices idle for another reason, such as logging
STRAGGLER = "straggler"  # devices idle for one process alone
LOST_STEPS = "lost_steps"  # steps that were made again
CAUSES = (
    DOWN, START, INDEX, COMPILE, RESTORE, LOST_STEPS, INPUT, HOST, STRAGGLER, EVALUATION, PICTURES, SAVE,
)  # fmt: skip
STEPS = "steps"


def _process_start() -> float:
    """Start of this process on the clock of `time.monotonic`; now, where the system doesn't tell."""
    with contextlib.suppress(OSError):
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since boot, proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age
    return time.monotonic()


class Goodput:
    """Wall time of a run by cause. At any time it goes to one cause, so that all causes add up to it.

    A new object counts from the start of its process. `continue_from` adds what earlier processes of the run counted.

    Attributes:
      started: Unix time of the run's first start.
      seconds: by cause.
    """

    def __init__(self) -> None:
        self._since, self._cause = _process_start(), START
        self.started = time.time() - (time.monotonic() - self._since)
        self.seconds = dict.fromkeys((STEPS, *CAUSES), 0.0)

    def switch(self, cause: str) -> str:
        """Counts the time from now on for `cause`; returns the cause before."""
        now = time.monotonic()
        self.seconds[self._cause] += now - self._since
        self._since, previous, self._cause = now, self._cause, cause
        return previous

    @contextlib.contextmanager
    def spent_on(self, cause: str) -> Iterator[None]:
        """Counts the time of the context for `cause`."""
        previous = self.switch(cause)
        try:
            yield
        finally:
            self.switch(previous)

    def move(self, cause: str, seconds: float) -> None:
        """Counts time of steps for `cause` instead."""
        self.seconds[STEPS] -= seconds
        self.seconds[cause] += seconds

    def record(self) -> dict[str, Any]:
        """The counts up to now, for `goodput.json`."""
        self.switch(self._cause)
        return {"started": self.started, "updated": time.time(), "seconds": dict(self.seconds)}

    def continue_from(self, record: Mapping[str, Any]) -> None:
        """Adds the counts of the run's earlier processes, and the time since their last record as `down`."""
        self.switch(self._cause)
        process_started = time.time() - sum(self.seconds.values())
        for cause, seconds in record["seconds"].items():
            self.seconds[cause] += seconds
        self.seconds[DOWN] += max(0.0, process_started - record["updated"])
        self.started = record["started"]

    def roll_back(self, productive_seconds: float) -> None:
        """Counts steps as lost, but for those up to a checkpoint, whose meta has their seconds."""
        self.switch(self._cause)
        self.move(LOST_STEPS, max(0.0, self.seconds[STEPS] - productive_seconds))

    def metrics(self) -> dict[str, float]:
        """`goodput`, the share of the wall time that went to kept steps, and `badput/CAUSE` in seconds."""
        self.switch(self._cause)
        badput = {f"badput/{cause}": self.seconds[cause] for cause in CAUSES if self.seconds[cause]}
        return {"goodput": self.seconds[STEPS] / max(sum(self.seconds.values()), 1e-9), **badput}

    def table(self) -> list[str]:
        """Lines of a table: the time and share of each cause, the largest first."""
        self.switch(self._cause)
        total = max(sum(self.seconds.values()), 1e-9)
        by_time = sorted(((seconds, cause) for cause, seconds in self.seconds.items() if seconds), reverse=True)
        return [f"{cause:<12}{duration(seconds):>9}{seconds / total:>8.1%}" for seconds, cause in by_time]


def read_record(workdir: epath.PathLike) -> dict[str, Any]:
    """The record in a workdir's `goodput.json`; {} where there is none."""
    record = files.read_side_file(epath.Path(workdir) / FILENAME)
    return record if {"started", "updated", "seconds"} <= record.keys() else {}
