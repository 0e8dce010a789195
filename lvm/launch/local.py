"""Local backend: ranks on this machine under a supervisor, which ends all when one fails and restarts the run."""

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
from lvm.launch.requests import SubmittedRun

_POLL = 0.1  # seconds


class Supervisor:
    """Runs a command as `processes` ranks, and restarts it until its exit code is final.

    Args:
      command: arguments of `python`, the same for every rank.
      processes: number of ranks.
      max_restarts: restart budget for failures; preemption is not counted. 0 never restarts.
      grace: seconds from SIGTERM to SIGKILL.
      environment: variables added to this process's.
      log: receives the ranks' output, besides stdout.
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
        self._terminated = False

    def run(self) -> int:
        """Returns the exit code of the last attempt; 128 + the signal's number for a signal."""
        signal.signal(signal.SIGTERM, self._forward_signal)
        signal.signal(signal.SIGINT, self._forward_signal)
        failures = 0
        while True:
            code = self._run_once()
            if self._terminated or code in errors.FINAL or not self._max_restarts:
                return code
            if code == errors.EXIT_PREEMPTED:  # not a failure
                log_info(f"restart after exit code {code}")
                continue
            failures += 1
            if failures > self._max_restarts:
                log_info(f"restart budget ({self._max_restarts}) exhausted")
                return code
            log_info(f"restart {failures} of {self._max_restarts} after exit code {code}")

    def _run_once(self) -> int:
        port = _free_port()
        self._ranks = [self._start(rank, port) for rank in range(self._processes)]
        prefixes = [f"[{rank}] " if self._processes > 1 else "" for rank in range(self._processes)]
        printers = [
            threading.Thread(target=_print, args=(prefix, rank.stdout, self._log))
            for prefix, rank in zip(prefixes, self._ranks, strict=True)
        ]
        for printer in printers:
            printer.start()
        log_info("processes " + ", ".join(str(rank.pid) for rank in self._ranks))
        if self._terminated:  # SIGTERM arrived while ranks were starting
            self._signal(signal.SIGTERM)
        code = self._wait()
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
            start_new_session=True,  # Ctrl-C reaches the ranks through this process alone
        )

    def _wait(self) -> int:
        """Waits for all ranks; when one fails, ends the others and returns its exit code."""
        while self._are_running():
            for index, rank in enumerate(self._ranks):
                if rank.poll():
                    code = _exit_code(rank)
                    if self._processes > 1:
                        log_info(f"process {index} of {self._processes} ended with exit code {code}")
                    self._end_all()
                    return code
            time.sleep(_POLL)
        return max((_exit_code(rank) for rank in self._ranks), default=0)

    def _are_running(self) -> bool:
        return any(rank.poll() is None for rank in self._ranks)

    def _end_all(self) -> None:
        deadline = time.monotonic() + self._grace
        self._signal(signal.SIGTERM)  # ranks save, or notice that a peer is gone, and exit
        while self._are_running() and time.monotonic() < deadline:
            time.sleep(_POLL)
        self._signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def _signal(self, signum: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signum)

    def _forward_signal(self, signum: int, frame: Any) -> None:
        self._terminated = True
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
    """Folder of a run on this machine, with its log and the locked PID file of its supervisor."""

    def __init__(self, folder: Path):
        self._folder, self._pid_path = folder, folder / "supervisor"
        self.log = folder / "log.txt"

    def acquire(self) -> IO[str]:
        """Locks the folder for the lifetime of this process; returns the open log.

        Raises:
          UserError: another process holds the lock.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = files.lock_file(self._pid_path)
        if lock is None:
            raise UserError(f"{self._folder.name}: a run of this name is in progress (process {self.pid()})")
        self._lock = lock  # held while this object lives
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return open(self.log, "a")

    def pid(self) -> int | None:
        """PID of the supervisor; None if the run has ended."""
        if not self._pid_path.exists():
            return None
        if lock := files.lock_file(self._pid_path, shared=True):
            lock.close()
            return None
        return int(self._pid_path.read_text() or 0) or None

    def state(self) -> str:
        pid = self.pid()
        return "ended" if pid is None else f"running, process {pid}"


def manage(verb: str, run: SubmittedRun, poll: float) -> None:
    """Executes `status`, `logs`, `cancel`, `list` or `watch`."""
    if verb == "list":
        for log in sorted(run.folder.glob("*/log.txt")):
            print(f"{log.parent.name}: {LocalRun(log.parent).state()}")
        return
    local_run = LocalRun(run.folder)
    if not local_run.log.exists():
        raise UserError(f"{run.name}: no run of this name on this machine ({run.folder})")
    if verb == "logs":
        print("".join(local_run.log.read_text().splitlines(keepends=True)[-200:]), end="")
    elif verb == "status":
        print(f"{run.name}: {local_run.state()}; workdir {run.workdir}")
    elif verb == "watch":
        while local_run.pid() is not None:
            time.sleep(poll)
        print(f"{run.name}: {local_run.state()}")
    else:
        pid = local_run.pid()
        if pid is None:
            raise UserError(f"{run.name}: has ended")
        os.kill(pid, signal.SIGTERM)
        print(f"{run.name}: sent SIGTERM to process {pid}")
