"""The hang watchdog, in processes of its own."""

import signal
import subprocess
import sys
import time
import types

import pytest

from lvm.common.errors import UserError
from lvm.training import watchdog
from lvm.training.watchdog import Watchdog, WatchdogConfig
from tests.commands import ROOT

# A program that runs code under a watchdog.
RUN = """
import sys, time
from lvm.training.watchdog import Watchdog, WatchdogConfig
def hang_here(seconds):
    time.sleep(seconds)
with Watchdog(WatchdogConfig(**{config})) as watchdog:
    {body}
print("done")
"""


def run(body, **config):
    limits = {
        "factor": 10.0,
        "min_timeout_s": 2.0,
        "startup_timeout_s": 60.0,
        "pause_timeout_s": 60.0,
        **config,
    }
    code = RUN.format(config=limits, body=body)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "config", "activity"),
    [
        ("watchdog.step_ended(); hang_here(30)", {}, "a step has not ended in"),
        ("hang_here(30)", {"startup_timeout_s": 0.5}, "the start has not ended in"),
        (
            "watchdog.step_ended()\n    with watchdog.pause('an evaluation'): hang_here(30)",
            {"pause_timeout_s": 0.5},
            "an evaluation has not",
        ),
    ],
)
def test_stalled_run_exits_76_with_all_stacks(body, config, activity):
    process = run(body, **config)
    assert process.returncode == 76
    assert f"error: stalled: {activity}" in process.stderr
    assert "in hang_here" in process.stderr
    assert "done" not in process.stdout


@pytest.mark.parametrize(
    "body",
    [
        "[(time.sleep(0.3), watchdog.step_ended()) for _ in range(10)]",
        "watchdog.step_ended()\n    with watchdog.pause('an evaluation'): time.sleep(2.5)\n    time.sleep(0.2)",
        "[(time.sleep(0.5), watchdog.step_ended()) for _ in range(3)]; time.sleep(2.5)",  # 10 × the median
    ],
)
def test_progressing_run_is_left_alone(body):
    process = run(body)
    assert (process.returncode, process.stdout) == (0, "done\n"), process.stderr


def test_deadline_follows_steps_not_compilation_or_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watched = Watchdog(WatchdogConfig(factor=10.0, min_timeout_s=5.0, pause_timeout_s=600.0))

    def step_ended(after):
        now[0] += after
        watched.step_ended()
        return watched._timeout_s

    assert step_ended(after=1000.0) == 5.0  # the first step compiles
    assert step_ended(after=2.0) == 20.0
    with watched.pause("an evaluation"):
        assert watched._timeout_s == 600.0
        now[0] += 500.0
    assert watched._timeout_s == 20.0
    assert step_ended(after=4.0) == 30.0  # the median of 2 s and 4 s
    assert step_ended(after=100.0) == 40.0


@pytest.mark.parametrize("name", ["factor", "min_timeout_s", "startup_timeout_s", "pause_timeout_s"])
def test_watchdog_config_names_bad_field(name):
    with pytest.raises(UserError, match=f"{name}=0.0 must be positive"):
        WatchdogConfig(**{name: 0.0})


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("hang_here(30)", 76)])
def test_suspended_process_is_not_stalled(body, code):
    """Ctrl-Z for longer than a step may take, then `fg`; what hangs after it is stalled all the same."""
    setup = (
        "import lvm.training.watchdog as module; module._SUSPENDED_S = 1.0; watchdog.step_ended(); print(flush=True); "
        "sys.stdin.readline()"
    )
    config = {"min_timeout_s": 4.5, "startup_timeout_s": 60.0}
    program = RUN.format(config=config, body=f"{setup}; {body}")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(5.0)
        process.send_signal(signal.SIGCONT)
        error = process.stderr.readline()  # of the watching thread, which sees how late it is
        output, rest = process.communicate("\n", timeout=60)
        error += rest
    assert process.returncode == code, error
    assert "the process was suspended for" in error
    assert ("done" in output) == (code == 0)
