"""What a command says while it works: plain lines from process 0, with rate and time left."""

from __future__ import annotations

import time

import jax


def log_info(text: str) -> None:
    """Prints one line, from the first process alone."""
    # Asking for the process index of a single process would take hold of its accelerator.
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """`95` → `1m35s`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Rate and time left of work that is counted in `unit`s."""

    def __init__(self, total: int, done: int = 0, unit: str = "steps"):
        self._total, self._unit = total, unit
        self._mark_done, self._mark_time = done, time.monotonic()

    def line(self, done: int) -> str:
        """`1200/5000 steps, 41.2 steps/s, 1m32s left`; the rate is that since the line before."""
        now = time.monotonic()
        rate = (done - self._mark_done) / max(now - self._mark_time, 1e-9)
        self._mark_done, self._mark_time = done, now
        text = f"{done}/{self._total} {self._unit}"
        if rate <= 0:
            return text
        left = duration((self._total - done) / rate)
        return f"{text}, {rate:.3g} {self._unit}/s, {left} left"
