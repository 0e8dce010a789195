"""Metrics of a run: `metrics.jsonl`, TensorBoard events and Weights & Biases.

Objects can't be appended to: on object storage the lines are in parts, `metrics/STEP.jsonl` with the step of the first
line, which a thread uploads.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from lvm.common import distributed, files
from lvm.common.errors import UserError
from lvm.common.logging import warn_once
from lvm.common.png import encode_png

FILENAME, PARTS = "metrics.jsonl", "metrics"
_PART_BYTES = 2**16  # from which on the next line begins a new part
_RETRY_S = 10.0


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns all complete lines of a workdir's metrics; a kill may have cut off the last one.

    A line that is none of a step's metrics, such as zeros after a power cut, is logged and left out.
    """
    return [record for path in _list_files(workdir) for record in _read_lines(path)]


def _list_files(workdir: epath.PathLike) -> list[epath.Path]:
    """The files with a workdir's metrics, in the order of their steps."""
    path = epath.Path(workdir) / FILENAME
    return [*([path] if path.exists() else []), *sorted((epath.Path(workdir) / PARTS).glob("*.jsonl"))]


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
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


def _to_bytes(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


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
        from tensorboardX import SummaryWriter  # it imports torch, for seconds, where that is installed

        self._workdir = epath.Path(workdir)
        self._lines: _LocalLines | _RemoteLines
        self._lines = (_RemoteLines if files.is_remote(self._workdir) else _LocalLines)(self._workdir, start)
        self._wandb: Any = None
        if wandb:
            self._wandb, self._wandb_image = _init_wandb(self._workdir, wandb)
        # TensorBoard drops what an earlier run wrote from `purge_step` on.
        self._events = SummaryWriter(os.fspath(self._workdir / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._enabled:
            return
        self._lines.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step's values."""
        if not self._enabled:
            return
        self._lines.append(step, _to_bytes([{"step": step, **values}]))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def write_pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Writes pictures of one step, to `pictures/NAME-STEP.png` too."""
        if not self._enabled:
            return
        for name, picture in pictures.items():
            folder = self._workdir / "pictures"
            folder.mkdir(exist_ok=True)
            files.write_atomically(folder / f"{name}-{step:07d}.png", encode_png(picture))
            self._events.add_image(name, picture, step, dataformats="HWC")
        if pictures and self._wandb is not None:
            self._wandb.log({"step": step, **{name: self._wandb_image(x) for name, x in pictures.items()}})

    def write_file(self, name: str, value: Any) -> None:
        """Writes a small JSON file of the workdir anew; on object storage in the background."""
        if self._enabled:
            self._lines.write_file(self._workdir / name, value)


class _LocalLines:
    """One file that lines are appended to."""

    def __init__(self, workdir: epath.Path, start: int):
        kept = [record for record in read_metrics(workdir) if record["step"] <= start]
        files.write_atomically(workdir / FILENAME, _to_bytes(kept))
        for part in (workdir / PARTS).glob("*.jsonl"):  # of a workdir copied from object storage
            part.unlink()
        self._file = open(workdir / FILENAME, "ab")  # noqa: SIM115 (closed by `close`)

    def append(self, step: int, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def write_file(self, path: epath.Path, value: Any) -> None:
        files.write_json(path, value)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class _RemoteLines:
    """Objects with some lines each; only the last one is ever rewritten."""

    def __init__(self, workdir: epath.Path, start: int):
        # The last first: whenever this is interrupted, no line is missing between others.
        for path in reversed(_list_files(workdir)):
            records = _read_lines(path)
            kept = [record for record in records if record["step"] <= start]
            if kept and len(kept) == len(records):
                break
            if kept:
                files.write_atomically(path, _to_bytes(kept))
            else:
                path.unlink()
        self._folder, self._path, self._part = workdir / PARTS, None, b""
        self._uploader = Uploader()

    def append(self, step: int, line: bytes) -> None:
        if self._path is None or len(self._part) >= _PART_BYTES:
            self._path, self._part = self._folder / f"{step:09d}.jsonl", b""
        self._part += line
        self._uploader.put(self._path, self._part)

    def write_file(self, path: epath.Path, value: Any) -> None:
        self._uploader.put(path, files.json_bytes(value))

    def close(self) -> None:
        self._uploader.close()


class Uploader:
    """Writes small objects from a thread, so that training never waits for them. Failed writes are tried again."""

    def __init__(self) -> None:
        self._pending: dict[epath.Path, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._upload, name="metrics", daemon=True)
        self._thread.start()

    def put(self, path: epath.Path, data: bytes) -> None:
        """Writes an object soon, unless its next content comes first."""
        with self._changed:
            self._pending[path] = data
            self._changed.notify()

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          OSError: an object can't be written, or an error of the storage's own type.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _upload(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if not self._pending:
                    return
                path = next(iter(self._pending))  # the oldest: parts appear in order
                data = self._pending.pop(path)
            try:
                files.write_atomically(path, data)
            except Exception as error:  # storage libraries have their own
                with self._changed:
                    if self._is_closed:
                        self._error = error
                        return
                    self._pending = {path: data} | self._pending
                    warn_once(f"{path}: not written, tried again: {error}")
                    self._changed.wait_for(lambda: self._is_closed, _RETRY_S)


def _init_wandb(workdir: epath.Path, project: str) -> tuple[Any, Any]:
    """Starts or resumes the Weights & Biases run of a workdir, whose id is kept in `wandb.json`.

    Returns the run and the class of its images.
    """
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
    return run, wandb.Image
