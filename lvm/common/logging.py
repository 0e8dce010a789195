"""Logging: one readable line a message on stderr, from process 0 unless it is a warning; progress with time left."""

import functools
import logging
import sys
import time

import jax

_LOGGER = logging.getLogger("lvm")
_process = ""  # prefix of the lines of one of several processes
_LOGGER.setLevel(logging.INFO)  # without `configure`, as in a notebook, Python itself shows warnings alone


def configure(quiet: bool = False, verbose: bool = False) -> None:
    """Sends log records of this process to stderr: `21:07:26 I message`, `[p3/64]` before it in a run of several.

    Args:
      quiet: show warnings and errors only.
      verbose: show debug messages of this project and informational ones of libraries.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)
    _LOGGER.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time_of_day = self.formatTime(record, "%H:%M:%S")
        library = "" if record.name == _LOGGER.name else f"{record.name}: "
        text = f"{time_of_day} {record.levelname[0]} {_process}{library}{record.getMessage()}"
        # A library's exception reaches the user as one error line of ours; its traceback is for debugging.
        if record.exc_info and (not library or _LOGGER.isEnabledFor(logging.DEBUG)):
            return f"{text}\n{self.formatException(record.exc_info)}"
        return text


def set_process(index: int, count: int) -> None:
    """Prefixes log lines with `[pINDEX/COUNT]`: the formatter must not ask JAX, which may log while it holds locks."""
    global _process
    _process = f"[p{index}/{count}] "


def log_info(message: str) -> None:
    """Logs one line, from the first process alone."""
    # Asking for the process index of a single process would initialize its accelerator.
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        _LOGGER.info("%s", message)


def log_warning(message: str) -> None:
    """Logs a warning, from whichever process calls."""
    _LOGGER.warning("%s", message)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning that a process repeats for nothing."""
    log_warning(message)


def duration(seconds: float) -> str:
    """`95` → `1m35s`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def format_progress(done: int, total: int, rate: float, unit: str = "steps") -> str:
    """`1200/5000 steps, 41.2 steps/s, 1m32s left`, with `rate` in units a second."""
    text = f"{done}/{total} {unit}"
    return text if rate <= 0 else f"{text}, {rate:.3g} {unit}/s, {duration((total - done) / rate)} left"


class Progress:
    """Rate and time left of work that is counted in `unit`s. `total` may change."""

    def __init__(self, total: int, done: int = 0, unit: str = "steps"):
        self.total, self._unit = total, unit
        self._last_done, self._last_time = done, time.monotonic()

    def line(self, done: int) -> str:
        """`format_progress` with the rate since the previous line."""
        now = time.monotonic()
        rate = (done - self._last_done) / max(now - self._last_time, 1e-9)
        self._last_done, self._last_time = done, now
        return format_progress(done, self.total, rate, self._unit)
