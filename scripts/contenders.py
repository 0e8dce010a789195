"""Benchmark contenders, each run in its own process so that none holds memory from the next."""

import contextlib
import importlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

from lvm.common import cli

Report = Callable[[dict[str, Any]], None]


def contend(
    module: str, job: Mapping[str, Any], limit: float, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Runs `python -m module --job=JSON` and returns the records that it reports, with one more for a failure.

    Args:
      module: a benchmark that takes `--job` and reports through `reporter(job)`.
      job: the contender's work; `contender` is "ours" or a peer, which must not initialize JAX's accelerator.
      limit: timeout in seconds.
      environment: additional environment variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, errors = pathlib.Path(folder, "results"), pathlib.Path(folder, "errors")
        results.touch()
        variables = {**os.environ, **(environment or {}), cli.PARENT: str(os.getpid())}
        variables |= {} if job["contender"] == "ours" else {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", module, f"--job={json.dumps({**job, 'results': str(results)})}"]
        failed = ""
        with errors.open("w") as stream:
            try:
                code = subprocess.run(command, env=variables, stderr=stream, timeout=limit).returncode
                last = (errors.read_text(errors="replace").strip().splitlines() or [""])[-1]
                failed = f"exit code {code}: {last}" if code else ""
            except subprocess.TimeoutExpired:
                failed = f"stopped after its {limit:.0f} s; --minutes allows more"
        records = [json.loads(line) for line in results.read_text().splitlines()]
    if failed:
        print(failed)
        records.append({"failed": one_line(failed)})
    return records


def run_job(job: dict[str, Any], ours: Callable[[dict[str, Any], Report], None], peer: str) -> None:
    """Runs one contender: `ours`, or `run` of the module `peer`, whose libraries may be missing."""
    report = reporter(job)
    if job["contender"] == "ours":
        ours(job, report)
        return
    try:
        module = importlib.import_module(peer)
    except ImportError as error:
        print(f"{error}")
        report({"failed": f"{error.name or error} isn't installed"})
        return
    module.run(job, report)


def reporter(job: Mapping[str, Any]) -> Report:
    """Returns the function to which a contender passes its records."""

    def report(record: dict[str, Any]) -> None:
        with open(job["results"], "a") as stream:
            stream.write(json.dumps(record) + "\n")

    return report


class Clock:
    """Items per second from now on, by wall clock and by CPU time of this process and its descendants.

    CPU time is independent of other load on the machine; it is available on Linux only, elsewhere it is zero.
    """

    def __init__(self) -> None:
        self._items, self._cpu_s = 0, 0.0
        self._start, self._cpu_start = time.perf_counter(), _cpu_seconds()

    def count(self, items: int) -> None:
        """Counts finished items."""
        self._items += items
        self._wall_s = time.perf_counter() - self._start
        self._cpu_s = max(self._cpu_s, _cpu_seconds() - self._cpu_start)

    def rates(self) -> dict[str, float]:
        """`rate` and `core_rate`: items per second, and per CPU second."""
        rate = self._items / max(self._wall_s, 1e-9)
        return {"rate": rate, "core_rate": self._items / self._cpu_s if self._cpu_s else 0.0}


def loading_rates(loader: Iterable[Sized]) -> dict[str, float]:
    """The rates of a loader's batches after the first, which waits for its workers to start."""
    batches = iter(loader)
    next(batches)
    clock = Clock()
    for batch in batches:
        clock.count(len(batch))
    return clock.rates()


def _cpu_seconds() -> float:
    """CPU time of this process and its living descendants."""
    total, pids = 0, [os.getpid()]
    while pids:
        proc = pathlib.Path("/proc", str(pids.pop()))
        with contextlib.suppress(OSError):
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])  # user and system time of all threads
            for task in (proc / "task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    return total / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """The CPU's model name, where it is known."""
    info = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def one_line(text: str) -> str:
    """Shortens text to 160 characters without line breaks."""
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
