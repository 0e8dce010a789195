"""Hang watchdog: exits with code 76 and dumps all stacks when a step exceeds its deadline.

A supervisor restarts a process that has exited, not one that hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from lvm.common.errors import EXIT_STALLED
from lvm.common.logging import log_warning
from lvm.common.validation import check_positive

_WINDOW = 100  # steps that the median is taken over
_SUSPENDED_S = 10.0  # lateness of the watching thread that only a suspended process explains


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Deadlines after which a run counts as stalled.

    Attributes:
      factor: deadline of a step, in multiples of the median step time …
      min_timeout_s: … and at least this long.
      startup_timeout_s: for the restore, and for the first step with its compilation.
      pause_timeout_s: for an evaluation, for rendering pictures, and for waiting for a checkpoint.
    """

    factor: float = 10.0
    min_timeout_s: float = 300.0
    startup_timeout_s: float = 3600.0
    pause_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in dataclasses.fields(self)))


class Watchdog:
    """Watches the run inside its context; a missed deadline ends the process."""

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._step_times: deque[float] = deque(maxlen=_WINDOW)
        self._start(config.startup_timeout_s, "the start")
        self._stopped = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stopped.set()

    def step_ended(self) -> None:
        """Records the end of a step and starts the next one's deadline."""
        now = time.monotonic()
        if self._activity != "the start":  # which includes compilation
            self._step_times.append(now - self._started_at)
        median = statistics.median(self._step_times) if self._step_times else 0.0
        self._start(max(self._config.factor * median, self._config.min_timeout_s), "a step")

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Applies `pause_timeout_s` to work between steps, and leaves it out of the step's time."""
        timeout_s, previous = self._timeout_s, self._activity
        self._start(self._config.pause_timeout_s, activity)
        yield
        self._start(timeout_s, previous)

    def _start(self, timeout_s: float, activity: str) -> None:
        self._started_at, self._timeout_s, self._activity = time.monotonic(), timeout_s, activity

    def _watch(self) -> None:
        seen_at = time.monotonic()
        while not self._stopped.wait(interval := min(1.0, self._timeout_s / 10)):
            now = time.monotonic()
            late, seen_at = now - seen_at - interval, now
            if late > _SUSPENDED_S:  # by Ctrl-Z, a scheduler or a sleeping machine: no thread ran, this one neither
                log_warning(f"the process was suspended for {late:.0f} s, which is no stall")
                self._started_at += late
            elapsed = now - self._started_at
            if elapsed > self._timeout_s:
                timeout = f"{elapsed:.0f} s (limit {self._timeout_s:.0f} s)"
                message = f"stalled: {self._activity} has not ended in {timeout}; the stacks of all threads follow"
                print(f"error: {message}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_STALLED)
