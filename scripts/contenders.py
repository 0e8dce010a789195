"""Contenders of a benchmark: each in a process of its own, so that none holds memory from the next."""

from __future__ import annotations

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
from collections.abc import Callable, Mapping
from typing import Any

from lvm.common import cli

Report = Callable[[dict[str, Any]], None]


def contend(
    module: str, job: Mapping[str, Any], limit: float, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Runs `python -m module --job=JSON`; the records that it reports, with one for whatever went wrong.

    Args:
      module: a benchmark that takes `--job` and answers through `reporter(job)`.
      job: what the contender does; its `contender` is "ours" or a peer that leaves the accelerator of JAX alone.
      limit: seconds after which it is stopped.
      environment: variables beside those of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, said = pathlib.Path(folder, "results"), pathlib.Path(folder, "errors")
        results.touch()
        variables = {**os.environ, **(environment or {}), cli.PARENT: str(os.getpid())}
        variables |= {} if job["contender"] == "ours" else {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", module, f"--job={json.dumps({**job, 'results': str(results)})}"]
        failed = ""
        with said.open("w") as stream:
            try:
                code = subprocess.run(command, env=variables, stderr=stream, timeout=limit).returncode
                last = (said.read_text(errors="replace").strip().splitlines() or [""])[-1]
                failed = f"exit code {code}: {last}" if code else ""
            except subprocess.TimeoutExpired:
                failed = f"stopped after its {limit:.0f} s; --minutes allows more"
        records = [json.loads(line) for line in results.read_text().splitlines()]
    if failed:
        print(failed)
        records.append({"failed": one_line(failed)})
    return records


def run_job(job: dict[str, Any], ours: Callable[[dict[str, Any], Report], None], peer: str) -> None:
    """One contender's work: `ours`, or `run` of the module `peer`, whose libraries may be missing."""
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
    """What a contender passes its records to."""

    def report(record: dict[str, Any]) -> None:
        with open(job["results"], "a") as stream:
            stream.write(json.dumps(record) + "\n")

    return report


class Clock:
    """Items a second from now on, by wall clock and by the processor's: of this process and all that it started.

    The second doesn't tell what other users of the machine take; it is known on Linux alone, elsewhere it is zero.
    """

    def __init__(self) -> None:
        self._items, self._processor = 0, 0.0
        self._start, self._processor_start = time.perf_counter(), _processor_seconds()

    def count(self, items: int) -> None:
        """Counts items that are done."""
        self._items += items
        self._seconds = time.perf_counter() - self._start
        self._processor = max(self._processor, _processor_seconds() - self._processor_start)

    def rates(self) -> dict[str, float]:
        """What a contender reports: `rate` and `core_rate`, items a second and a second of one core."""
        found = {"rate": self._items / max(self._seconds, 1e-9)}
        return found | {"core_rate": self._items / self._processor if self._processor else 0.0}


def _processor_seconds() -> float:
    """Of this process and its descendants, those that live."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        place = pathlib.Path("/proc", str(waiting.pop()))
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])  # user and system, of all threads
            for task in (place / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return total / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """The processor as its maker calls it, where that is known."""
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def one_line(text: str) -> str:
    """At most 160 characters, without line breaks."""
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
