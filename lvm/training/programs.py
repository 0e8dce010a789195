"""What a run keeps of its compiled programs: a cache for the next start, and traces of their steps."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
from etils import epath

from lvm.console import say

REQUEST = "profile.request"
_REQUESTED_STEPS = 3


def cache_programs(folder: str, workdir: epath.Path) -> None:
    """Keeps compiled programs for the next start, in `folder` (local or gs://; "" is the workdir's own).

    Says when one was there. Must come before the first program is compiled.
    """
    jax.config.update("jax_compilation_cache_dir", folder or os.fspath(workdir / "compilation_cache"))
    global _listening
    if not _listening:
        jax.monitoring.register_event_listener(_say_cache)
        _listening = True


_listening = False


def _say_cache(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        say("compiled program found in the cache")


class Tracer:
    """Writes profiler traces of chosen steps, and of the next ones whenever `profile.request` appears.

    Args:
      workdir: traces go to `profile/` there.
      steps: the first and the last step, or nothing.
    """

    def __init__(self, workdir: epath.Path, steps: Sequence[int]):
        self._workdir = workdir
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    def before(self, step: int) -> None:
        """Starts or stops a trace as this step asks for."""
        if self._tracing and step > self._last:
            self.stop()
        if not self._tracing and (self._workdir / REQUEST).exists():
            (self._workdir / REQUEST).unlink(missing_ok=True)
            self._first, self._last = step, step + _REQUESTED_STEPS - 1
        if step == self._first and not self._tracing:
            folder = self._workdir / "profile"
            jax.profiler.start_trace(os.fspath(folder))
            say(f"tracing steps {self._first} to {self._last} into {folder}")
            self._tracing = True

    def stop(self) -> None:
        """Ends a trace that runs."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
