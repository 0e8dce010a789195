"""Local backend: ranks on this machine under a supervisor, which ends all when one fails and restarts the run."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lvm.common import cli, distributed, errors, files
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.launch.requests import SubmittedRun

_POLL = 0.1  # seconds
_PID, _LOG = "supervisor", "log.txt"  # in the folder of a run; the PID file is locked while the run lives


@dataclasses.dataclass
class Supervisor:
    """Runs a command as `processes` ranks, and restarts it until its exit code is final.

    Attributes:
      command: arguments of `python`, the same for every rank.
      max_restarts: restart budget: failures without progress in between; preemption is not counted. 0 never restarts.
      grace: seconds from SIGTERM to SIGKILL.
      progress: step of the newest checkpoint, or complete shards.
      unit: "step" or "shard", for messages.
      environment: variables added to this process's.
      log: receives the ranks' output, besides stdout.
    """

    command: Sequence[str]
    processes: int
    max_restarts: int
    grace: float
    progress: Callable[[], int] = lambda: 0
    unit: str = "step"
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    log: IO[str] | None = None

    def __post_init__(self) -> None:
        self._ranks: list[subprocess.Popen] = []
        self._terminated = False

    def run(self) -> int:
        """Returns the exit code of the last attempt; 128 + the signal's number for a signal."""
        handlers = {number: signal.signal(number, self._forward_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run_until_final()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run_until_final(self) -> int:
        failures: Counter[int] = Counter()  # by progress
        progress = 0
        while True:
            code = self._run_once()
            if self._terminated or code in errors.FINAL or not self.max_restarts:
                return code
            if code == errors.EXIT_PREEMPTED:  # not a failure
                log_info(f"restart after exit code {code}")
                continue
            progress = self._progress(progress)
            failures[progress] += 1
            reached = f"{self.unit} {progress}"
            if failures[progress] > self.max_restarts:
                log_warning(f"restart budget ({self.max_restarts}) exhausted: nothing saved since {reached}")
                return code
            log_warning(f"restart {failures[progress]} of {self.max_restarts} from {reached} after exit code {code}")

    @property
    def terminated(self) -> bool:
        """True once this process has received SIGTERM or SIGINT, which it passed on to the ranks."""
        return self._terminated

    def _progress(self, last: int) -> int:
        try:
            return self.progress()
        except Exception as error:  # storage libraries raise types of their own; the run goes on without the answer
            log_warning(f"what is saved is unknown ({error}); taking {self.unit} {last}")
            return last

    def _run_once(self) -> int:
        port = free_port()
        self._ranks = [self._start(rank, port) for rank in range(self.processes)]
        printers = [
            threading.Thread(target=_print, args=(f"[{index}] " if self.processes > 1 else "", rank.stdout, self.log))
            for index, rank in enumerate(self._ranks)
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
        environment = {**os.environ, **self.environment, cli.PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self.processes > 1:
            environment[distributed.COORDINATOR] = f"localhost:{port}"
            environment[distributed.NUM_PROCESSES] = str(self.processes)
            environment[distributed.PROCESS_ID] = str(rank)
        return subprocess.Popen(
            [sys.executable, *self.command],
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
                    if self.processes > 1:
                        log_info(f"process {index} of {self.processes} ended with exit code {code}")
                    self._end_all()
                    return code
            time.sleep(_POLL)
        return max((_exit_code(rank) for rank in self._ranks), default=0)

    def _are_running(self) -> bool:
        return any(rank.poll() is None for rank in self._ranks)

    def _end_all(self) -> None:
        deadline = time.monotonic() + self.grace
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _print(prefix: str, stream: IO[bytes] | None, log: IO[str] | None) -> None:
    for line in stream or ():
        for output in filter(None, (sys.stdout, log)):
            output.write(prefix + line.decode(errors="replace"))
            output.flush()


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[IO[str]]:
    """Locks the folder of a run, so that `manage` finds this process; yields the open log.

    Raises:
      UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid = _supervisor_pid(folder)
    lock = None if pid else files.lock_file(folder / _PID)
    if lock is None:
        raise UserError(f"{folder.name}: a run of this name is in progress (process {pid or _supervisor_pid(folder)})")
    with lock, open(folder / _LOG, "a", encoding="utf-8") as log:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield log
        finally:
            lock.truncate(0)


def _supervisor_pid(folder: Path) -> int | None:
    """PID of the supervisor; None if the run has ended."""
    path = folder / _PID
    text = path.read_text("utf-8") if path.exists() else ""
    if not text.isdigit():  # a supervisor that has just started
        return None
    is_alive = files.is_locked(path)
    if is_alive is None:  # the file system has no locks
        is_alive = Path("/proc", text).exists()
    return int(text) if is_alive else None


def _state(folder: Path) -> str:
    pid = _supervisor_pid(folder)
    return "ended" if pid is None else f"running, process {pid}"


def manage(verb: str, run: SubmittedRun, poll: float) -> None:
    """Executes `status`, `logs`, `cancel`, `list` or `watch`."""
    if verb == "list":
        for log in sorted(run.folder.glob(f"*/{_LOG}")):
            print(f"{log.parent.name}: {_state(log.parent)}")
        return
    if not (run.folder / _LOG).exists():
        raise UserError(f"{run.name}: no run of this name on this machine ({run.folder})")
    if verb == "logs":
        print("".join((run.folder / _LOG).read_text("utf-8", "replace").splitlines(keepends=True)[-200:]), end="")
    elif verb == "status":
        print(f"{run.name}: {_state(run.folder)}; {f'store {run.store}' if run.store else f'workdir {run.workdir}'}")
    elif verb == "watch":
        while _supervisor_pid(run.folder) is not None:
            time.sleep(poll)
        print(f"{run.name}: {_state(run.folder)}")
    else:
        pid = _supervisor_pid(run.folder)
        if pid is None:
            raise UserError(f"{run.name}: has ended")
        os.kill(pid, signal.SIGTERM)
        print(f"{run.name}: sent SIGTERM to process {pid}")
