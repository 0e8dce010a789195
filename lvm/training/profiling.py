"""Profiler traces of chosen training steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from lvm.common import distributed, files
from lvm.common.logging import log_info

REQUEST = "profile.request"
_REQUESTED_STEPS = 3
_LOOK = 10.0  # seconds between looks for a request on gs://, where each takes longer than a step may


class StepProfiler:
    """Writes profiler traces of chosen steps, and of the next ones whenever `profile.request` appears.

    Args:
      workdir: traces go to `profile/` there.
      steps: the first and the last step, or nothing.
    """

    def __init__(self, workdir: epath.Path, steps: Sequence[int]):
        self._workdir = workdir
        self._first, self._last = steps or (0, 0)
        self._tracing, self._looked = False, -_LOOK

    def before(self, step: int) -> None:
        """Starts or stops a trace as this step asks for."""
        if self._tracing and step > self._last:
            self.stop()
        if not self._tracing and self._requested():
            (self._workdir / REQUEST).unlink(missing_ok=True)
            self._first, self._last = step, step + _REQUESTED_STEPS - 1
        if step == self._first and not self._tracing:
            folder = self._workdir / "profile"
            self._local = tempfile.mkdtemp() if files.is_remote(folder) else os.fspath(folder)
            jax.profiler.start_trace(self._local)
            log_info(f"tracing steps {self._first} to {self._last} into {folder}")
            self._tracing = True

    def stop(self) -> None:
        """Ends a trace that runs."""
        if not self._tracing:
            return
        jax.profiler.stop_trace()
        self._tracing = False
        if files.is_remote(self._workdir):
            for path in Path(self._local).rglob("*.*"):
                if path.is_file():
                    files.put(path, self._workdir / "profile" / path.relative_to(self._local))
            shutil.rmtree(self._local)

    def _requested(self) -> bool:
        """Of the first process alone: the others would find the file gone."""
        now = time.monotonic()
        if not distributed.is_first():
            return False
        if files.is_remote(self._workdir) and now - self._looked < _LOOK:
            return False
        self._looked = now
        return (self._workdir / REQUEST).exists()
