"""Where a run's metrics go: lines of JSON, cut back to the step that it resumes from, and TensorBoard's events."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from lvm import distributed, files

FILENAME = "metrics.jsonl"


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All whole lines of a workdir's metrics; a line cut off by a kill is left out."""
    path = epath.Path(workdir) / FILENAME
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is a line cut off
    return [json.loads(line) for line in lines]


class MetricsWriter:
    """Writes a workdir's metrics from step `start` on, dropping what an earlier run wrote beyond it.

    Lines go to `metrics.jsonl`, events to `tensorboard/`; the first process alone writes.
    """

    def __init__(self, workdir: epath.PathLike, start: int):
        self._writes = distributed.is_first()
        if not self._writes:
            return
        kept = [line for line in read(workdir) if line["step"] <= start]
        path = epath.Path(workdir) / FILENAME
        files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a")  # noqa: SIM115 (open for as long as the run)
        # From this step on, TensorBoard drops what an earlier run wrote.
        self._events = SummaryWriter(os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if not self._writes:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._events.close()


class Goodput:
    """The share of a run's wall time, restarts and all, that went into steps which were kept.

    Steps that a restart repeats don't count: what they took is not in the checkpoint that it goes on from.
    """

    def __init__(self, started: float | None = None, productive: float = 0.0):
        self._started = time.time() if started is None else started
        self._productive = productive  # seconds

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Goodput:
        """As a checkpoint's meta has it."""
        return cls(meta["started"], meta["productive_seconds"])

    def to_json(self) -> dict[str, float]:
        return {"started": self._started, "productive_seconds": self._productive}

    def add(self, seconds: float) -> float:
        """Counts the time of more steps; returns the share so far."""
        self._productive += seconds
        return min(1.0, self._productive / max(time.time() - self._started, 1e-9))
