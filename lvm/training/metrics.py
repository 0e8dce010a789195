"""Metrics of a run: `metrics.jsonl`, TensorBoard events and Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from lvm.common import distributed, files
from lvm.common.errors import UserError
from lvm.common.logging import warn_once

FILENAME = "metrics.jsonl"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns all complete lines of a workdir's metrics; a kill may have cut off the last one.

    A line that is none of a step's metrics, such as zeros after a power cut, is logged and left out.
    """
    path = epath.Path(workdir) / FILENAME
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            warn_once(f"{path}:{number}: not a step's metrics, left out: {line[:40]!r}")
    return records


class MetricsWriter:
    """Writes a workdir's metrics after step `start`, dropping what an earlier run wrote beyond it. A context manager.

    Only the first process writes. `wandb` is a Weights & Biases "project" or "entity/project"; "" for none.

    Raises:
      UserError: Weights & Biases is requested and not installed, or refuses.
    """

    def __init__(self, workdir: epath.PathLike, start: int, wandb: str = ""):
        self._enabled = distributed.is_first()
        if not self._enabled:
            return
        kept = [line for line in read_metrics(workdir) if line["step"] <= start]
        self._path = epath.Path(workdir) / FILENAME
        self._text = "".join(json.dumps(line) + "\n" for line in kept)  # rewritten as a whole on gs://
        files.write_atomically(self._path, self._text.encode())
        self._wandb = _init_wandb(epath.Path(workdir), wandb) if wandb else None
        self._file = None if files.is_remote(self._path) else open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed on exit)
        # TensorBoard drops what an earlier run wrote from `purge_step` on.
        self._events = SummaryWriter(os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._enabled:
            return
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step's values."""
        if not self._enabled:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is None:
            # Objects can't be appended to. At 500 bytes a line, rewriting is cheap.
            self._text += line
            files.write_atomically(self._path, self._text.encode())
        else:
            self._file.write(line)
            self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})


def _init_wandb(workdir: epath.Path, project: str) -> Any:
    """Starts or resumes the Weights & Biases run of a workdir, whose id is kept in `wandb.json`."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"config.loop.wandb: {project}: pip install wandb ({error})") from error
    id_path = workdir / "wandb.json"
    if "id" not in files.read_side_file(id_path):
        files.write_json(id_path, {"id": uuid.uuid4().hex[:8]})
    entity, _, name = project.rpartition("/")
    try:
        run = wandb.init(
            entity=entity or None,
            project=name,
            id=files.read_json(id_path)["id"],
            name=workdir.name,
            dir=None if files.is_remote(workdir) else os.fspath(workdir),
            config=files.read_json(workdir / "config.json"),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(f"config.loop.wandb: {project}: {error}") from error
    run.define_metric("*", step_metric="step")  # so that repeated steps of a resumed run overlay
    return run


@dataclasses.dataclass
class Goodput:
    """Share of a run's wall time, restarts included, spent on steps that were kept; its fields go into checkpoints.

    Steps repeated after a restart don't count: their time is not in the checkpoint that the run resumed from.
    """

    started: float = dataclasses.field(default_factory=lambda: time.time())
    productive_seconds: float = 0.0

    def add(self, seconds: float) -> float:
        """Adds productive time; returns the goodput so far."""
        self.productive_seconds += seconds
        return min(1.0, self.productive_seconds / max(time.time() - self.started, 1e-9))
