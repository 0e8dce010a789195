"""A run of several processes on this machine, watched over: one that fails ends the others, and the run is resumed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lvm.common import cli, distributed, errors, files
from lvm.common.errors import UserError
from lvm.common.logging import log_info

_POLL = 0.1  # seconds


class Supervisor:
    """Runs a command as `processes` ranks, again and again until it ends for good.

    Args:
      command: arguments after `python`, the same for every rank.
      processes: how many ranks.
      max_restarts: how often a run that failed is started again; one that was preempted always is. 0 is never.
      grace: seconds that ranks have to end by themselves after SIGTERM.
      environment: variables beside those of this process.
      log: takes what the ranks print, beside this process's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        max_restarts: int,
        grace: float,
        environment: Mapping[str, str] | None = None,
        log: IO[str] | None = None,
    ):
        self._command, self._processes = list(command), processes
        self._max_restarts, self._grace = max_restarts, grace
        self._environment, self._log = environment or {}, log
        self._ranks: list[subprocess.Popen] = []
        self._ending = False

    def run(self) -> int:
        """Returns the exit code of the run's last start; a signal's is 128 + its number."""
        signal.signal(signal.SIGTERM, self._pass_on)
        signal.signal(signal.SIGINT, self._pass_on)
        failures = 0
        while True:
            code = self._run_once()
            if self._ending or code in errors.FINAL or not self._max_restarts:
                return code
            if code == errors.EXIT_PREEMPTED:  # which is no failure
                log_info(f"restart after exit code {code}")
                continue
            failures += 1
            if failures > self._max_restarts:
                log_info(f"given up after {self._max_restarts} restarts")
                return code
            log_info(f"restart {failures} of {self._max_restarts} after exit code {code}")

    def _run_once(self) -> int:
        port = _free_port()
        self._ranks = [self._start(rank, port) for rank in range(self._processes)]
        printers = [
            threading.Thread(
                target=_print, args=(f"[{number}] " if self._processes > 1 else "", rank.stdout, self._log)
            )
            for number, rank in enumerate(self._ranks)
        ]
        for printer in printers:
            printer.start()
        log_info("processes " + ", ".join(str(rank.pid) for rank in self._ranks))
        if self._ending:  # SIGTERM came while they were being started
            self._signal(signal.SIGTERM)
        code = self._watch()
        for printer in printers:
            printer.join()
        return code

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        environment = {
            **os.environ,
            **self._environment,
            cli.PARENT: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        if self._processes > 1:
            environment[distributed.COORDINATOR] = f"localhost:{port}"
            environment[distributed.NUM_PROCESSES] = str(self._processes)
            environment[distributed.PROCESS_ID] = str(rank)
        return subprocess.Popen(
            [sys.executable, *self._command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C comes to the ranks through this process alone
        )

    def _watch(self) -> int:
        """Waits for the ranks; the first that fails decides, and the others are ended."""
        while any(rank.poll() is None for rank in self._ranks):
            failed = [(number, rank) for number, rank in enumerate(self._ranks) if rank.poll()]
            if failed:
                number, rank = failed[0]
                code = _exit_code(rank)
                if self._processes > 1:
                    log_info(f"process {number} of {self._processes} ended with exit code {code}")
                self._end_all()
                return code
            time.sleep(_POLL)
        return max((_exit_code(rank) for rank in self._ranks), default=0)

    def _end_all(self) -> None:
        deadline = time.monotonic() + self._grace
        # A rank that was told to save, or found that another is gone, ends by itself.
        self._signal(signal.SIGTERM)
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(_POLL)
        self._signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _pass_on(self, number: int, frame: Any) -> None:
        self._ending = True
        self._signal(signal.SIGTERM)


def _exit_code(rank: subprocess.Popen) -> int:
    return 128 - rank.returncode if rank.returncode < 0 else rank.returncode


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _print(prefix: str, stream: IO[bytes] | None, log: IO[str] | None) -> None:
    for line in stream or ():
        for output in filter(None, (sys.stdout, log)):
            output.write(prefix + line.decode(errors="replace"))
            output.flush()


class LocalRun:
    """A folder that a run on this machine is found by: its supervisor's number and its log.

    Args:
      folder: made if it isn't there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.log = folder / "log.txt"

    def hold(self) -> IO[str]:
        """Takes the folder for this process, until it ends; returns the log, open.

        Raises:
          UserError: another process has it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = files.lock_file(self._folder / "supervisor")
        if lock is None:
            raise UserError(f"{self._folder.name}: a run of this name is going on (process {self.pid()})")
        self._lock = lock  # held while this lives
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return open(self.log, "a")

    def pid(self) -> int | None:
        """The process that runs it, or None where it has ended."""
        path = self._folder / "supervisor"
        if not path.exists():
            return None
        if lock := files.lock_file(path, shared=True):
            lock.close()
            return None
        return int(path.read_text() or 0) or None
