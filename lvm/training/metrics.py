"""`metrics.jsonl`: one line a logged step, appended, cut back to the step that a run resumes from."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from lvm import files

FILENAME = "metrics.jsonl"


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All whole lines of a workdir's metrics; a line cut off by a kill is left out."""
    path = epath.Path(workdir) / FILENAME
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is a line cut off
    return [json.loads(line) for line in lines]


class MetricsWriter:
    """Appends to a workdir's metrics from step `start` on, dropping what an earlier run wrote beyond it."""

    def __init__(self, workdir: epath.PathLike, start: int):
        kept = [line for line in read(workdir) if line["step"] <= start]
        path = epath.Path(workdir) / FILENAME
        files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a")  # noqa: SIM115 (open for as long as the run)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
