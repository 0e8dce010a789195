"""Ends a run that stands still: a supervisor can restart what has ended, not what waits for ever."""

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

from lvm.common.errors import EXIT_STALLED, UserError

_REMEMBERED = 100  # steps whose median is the usual time


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as stalled, in seconds.

    Attributes:
      factor: steps of this many times the median are too long …
      min_timeout_s: … but not those shorter than this.
      startup_timeout_s: for restoring, and for compiling with the first step.
      pause_timeout_s: for an evaluation, for drawing pictures, and for waiting for a checkpoint.
    """

    factor: float = 10.0
    min_timeout_s: float = 300.0
    startup_timeout_s: float = 3600.0
    pause_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(f"{field.name}: {getattr(self, field.name)} is not positive")


class Watchdog:
    """While in its context, something must end in time, or all stacks are printed and the process exits with 76."""

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._limit, self._what = config.startup_timeout_s, "the start"
        self._mark = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()

    def step_ended(self) -> None:
        """Another step's results are there."""
        now = time.monotonic()
        if self._what != "the start":  # the first step has compiled
            self._steps.append(now - self._mark)
        usual = statistics.median(self._steps) if self._steps else 0.0
        self._mark, self._what = now, "a step"
        self._limit = max(self._config.factor * usual, self._config.min_timeout_s)

    @contextlib.contextmanager
    def pausing(self, what: str) -> Iterator[None]:
        """Time between steps that is not a step's."""
        limit, before = self._limit, self._what
        self._mark, self._limit, self._what = time.monotonic(), self._config.pause_timeout_s, what
        yield
        self._mark, self._limit, self._what = time.monotonic(), limit, before

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 10)):
            waited = time.monotonic() - self._mark
            if waited > self._limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        print(
            f"error: stalled: {self._what} has not ended in {waited:.0f} s (limit {self._limit:.0f} s); "
            "the stacks of all threads follow",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_STALLED)
