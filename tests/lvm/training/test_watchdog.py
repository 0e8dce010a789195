import subprocess
import sys

import pytest

from lvm.common.errors import UserError
from lvm.training.watchdog import WatchdogConfig
from tests.commands import ROOT

# What a run does under a watchdog, given as code, in a process of its own.
RUN = """
import sys, time
from lvm.training.watchdog import Watchdog, WatchdogConfig
def waits_here(seconds):
    time.sleep(seconds)
with Watchdog(WatchdogConfig(**{config})) as watchdog:
    {body}
print("done")
"""


def run(body, **config):
    limits = {
        "factor": 10.0,
        "min_timeout_s": 0.5,
        "startup_timeout_s": 60.0,
        "pause_timeout_s": 60.0,
        **config,
    }
    code = RUN.format(config=limits, body=body)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "config", "what"),
    [
        ("watchdog.step_ended(); waits_here(30)", {}, "a step has not ended in"),
        ("waits_here(30)", {"startup_timeout_s": 0.5}, "the start has not ended in"),
        (
            "watchdog.step_ended()\n    with watchdog.pausing('an evaluation'): waits_here(30)",
            {"pause_timeout_s": 0.5},
            "an evaluation has not",
        ),
    ],
)
def test_a_run_that_stands_still_ends_with_76_and_all_stacks(body, config, what):
    ended = run(body, **config)
    assert ended.returncode == 76
    assert f"error: stalled: {what}" in ended.stderr
    assert "in waits_here" in ended.stderr
    assert "done" not in ended.stdout


@pytest.mark.parametrize(
    "body",
    [
        "[(time.sleep(0.1), watchdog.step_ended()) for _ in range(10)]",
        "watchdog.step_ended()\n    with watchdog.pausing('an evaluation'): time.sleep(1.5)\n    time.sleep(0.2)",
        "[(time.sleep(0.2), watchdog.step_ended()) for _ in range(4)]; time.sleep(1.0)",  # 10 × the median
    ],
)
def test_a_run_that_goes_on_is_left_alone(body):
    ended = run(body)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("name", ["factor", "min_timeout_s", "startup_timeout_s", "pause_timeout_s"])
def test_impossible_limits_are_named(name):
    with pytest.raises(UserError, match=f"{name}: 0.0 is not positive"):
        WatchdogConfig(**{name: 0.0})
