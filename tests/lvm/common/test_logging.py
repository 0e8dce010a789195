"""Durations and rates as people read them."""

import pytest

from lvm.common import logging


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (95, "1m35s"),
        (3600, "1h00m"),
        (90061, "25h01m"),
    ],
)
def test_durations(seconds, text):
    assert logging.duration(seconds) == text


def test_progress_gives_the_rate_since_the_line_before(monkeypatch):
    now = iter([0.0, 10.0, 15.0])
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(now))
    progress = logging.Progress(total=1000, done=100)
    assert progress.line(200) == "200/1000 steps, 10 steps/s, 1m20s left"
    assert progress.line(600) == "600/1000 steps, 80 steps/s, 5s left"


def test_progress_without_progress_promises_nothing():
    assert logging.Progress(10, unit="scenes").line(0) == "0/10 scenes"


def test_the_first_process_says_it(capsys):
    logging.log_info("hello")
    assert capsys.readouterr().out == "hello\n"
