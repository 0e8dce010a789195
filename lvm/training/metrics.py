"""Where a run's metrics go: lines of JSON, cut back to the step that it resumes from, and TensorBoard's events."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from lvm.common import distributed, files
from lvm.common.errors import UserError

FILENAME = "metrics.jsonl"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All whole lines of a workdir's metrics; a line cut off by a kill is left out."""
    path = epath.Path(workdir) / FILENAME
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is a line cut off
    return [json.loads(line) for line in lines]


class MetricsWriter:
    """Writes a workdir's metrics from step `start` on, dropping what an earlier run wrote beyond it. A context.

    Lines go to `metrics.jsonl`, events to `tensorboard/`, and both to Weights & Biases when asked; the first
    process alone writes.

    Args:
      workdir: the run's folder.
      start: the step that is gone on from.
      wandb: "project" or "entity/project" of Weights & Biases; "" for none.

    Raises:
      UserError: Weights & Biases is asked for and not installed, or refuses.
    """

    def __init__(self, workdir: epath.PathLike, start: int, wandb: str = ""):
        self._writes = distributed.is_first()
        if not self._writes:
            return
        kept = [line for line in read_metrics(workdir) if line["step"] <= start]
        self._path = epath.Path(workdir) / FILENAME
        self._lines = "".join(json.dumps(line) + "\n" for line in kept)  # kept for gs:// alone
        files.write_atomically(self._path, self._lines.encode())
        self._wandb = _join_wandb(epath.Path(workdir), wandb) if wandb else None
        remote = files.is_remote(self._path)
        self._file = None if remote else open(self._path, "a")  # noqa: SIM115 (open for as long as the run)
        # From this step on, TensorBoard drops what an earlier run wrote.
        self._events = SummaryWriter(os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._writes:
            return
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One step's values."""
        if not self._writes:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is None:
            # Nothing can be appended to an object: it is written anew, which at 500 bytes a line is soon done.
            self._lines += line
            files.write_atomically(self._path, self._lines.encode())
        else:
            self._file.write(line)
            self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})


def _join_wandb(workdir: epath.Path, project: str) -> Any:
    """The Weights & Biases run of a workdir: the same one at every start, its id kept in `wandb.json`."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"config.loop.wandb: {project}: pip install wandb ({error})") from error
    record = workdir / "wandb.json"
    if not record.exists():
        files.write_json(record, {"id": uuid.uuid4().hex[:8]})
    entity, _, name = project.rpartition("/")
    try:
        run = wandb.init(
            entity=entity or None,
            project=name,
            id=files.read_json(record)["id"],
            name=workdir.name,
            dir=None if files.is_remote(workdir) else os.fspath(workdir),
            config=files.read_json(workdir / "config.json"),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(f"config.loop.wandb: {project}: {error}") from error
    # Against the training step, not the number of calls: what a resumed run repeats lies over what it was.
    run.define_metric("*", step_metric="step")
    return run


class Goodput:
    """The share of a run's wall time, restarts and all, that went into steps which were kept.

    Steps that a restart repeats don't count: what they took is not in the checkpoint that it goes on from.
    """

    def __init__(self, started: float | None = None, productive: float = 0.0):
        self._started = time.time() if started is None else started
        self._productive = productive  # seconds

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Goodput:
        """As a checkpoint's meta has it."""
        return cls(meta["started"], meta["productive_seconds"])

    def reset(self) -> Goodput:
        """With nothing kept so far, since the same start."""
        return Goodput(self._started)

    def to_json(self) -> dict[str, float]:
        return {"started": self._started, "productive_seconds": self._productive}

    def add(self, seconds: float) -> float:
        """Counts the time of more steps; returns the share so far."""
        self._productive += seconds
        return min(1.0, self._productive / max(time.time() - self._started, 1e-9))
