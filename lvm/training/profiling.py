"""Profiler traces of chosen training steps."""

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
_POLL_S = 10.0  # between looks for a request on gs://, which may take longer than a step


class StepProfiler:
    """Traces steps into `profile/` of a workdir, and the next ones whenever `profile.request` appears there.

    `steps` are the first and the last step, or empty.
    """

    def __init__(self, workdir: epath.Path, steps: Sequence[int]):
        self._workdir = workdir
        self._first, self._last = steps or (0, 0)
        self._tracing, self._polled_at = False, -_POLL_S

    def start_step(self, step: int) -> None:
        """Starts or stops the trace before `step`."""
        if self._tracing and step > self._last:
            self.stop()
        if not self._tracing and self._is_requested():
            (self._workdir / REQUEST).unlink(missing_ok=True)
            self._first, self._last = step, step + _REQUESTED_STEPS - 1
        if step == self._first and not self._tracing:
            folder = self._workdir / "profile"
            self._local = tempfile.mkdtemp() if files.is_remote(folder) else os.fspath(folder)
            jax.profiler.start_trace(self._local)
            log_info(f"tracing steps {self._first} to {self._last} into {folder}")
            self._tracing = True

    def stop(self) -> None:
        """Stops the trace, if one is running."""
        if not self._tracing:
            return
        jax.profiler.stop_trace()
        self._tracing = False
        if files.is_remote(self._workdir):
            for path in filter(Path.is_file, Path(self._local).rglob("*.*")):
                files.put(path, self._workdir / "profile" / path.relative_to(self._local))
            shutil.rmtree(self._local)

    def _is_requested(self) -> bool:
        if not distributed.is_first():  # which removes the file
            return False
        now = time.monotonic()
        if files.is_remote(self._workdir) and now - self._polled_at < _POLL_S:
            return False
        self._polled_at = now
        return (self._workdir / REQUEST).exists()
