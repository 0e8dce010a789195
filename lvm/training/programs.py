"""What a run keeps of its compiled programs: a cache for the next start, and traces of their steps."""

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


def cache_programs(folder: str, workdir: epath.Path) -> None:
    """Keeps compiled programs for the next start, in `folder` (local or gs://).

    "" is what `JAX_COMPILATION_CACHE_DIR` says, or else the workdir's own.

    Says when one was there, and when not. Must come before the first program is compiled.
    """
    own = os.fspath(workdir / "compilation_cache")
    jax.config.update(
        "jax_compilation_cache_dir", folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or own
    )
    global _listening
    if not _listening:
        jax.monitoring.register_event_listener(_say_cache)
        _listening = True


_listening = False


def _say_cache(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        log_info("compiled program found in the cache")
    if event == "/jax/compilation_cache/cache_misses":
        log_info("compiled program put into the cache, where it was missing")


class Tracer:
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
