"""Logging levels and format; durations and rates as people read them."""

import re
import subprocess
import sys
from logging import DEBUG, INFO, WARNING, LogRecord

import pytest

from lvm.common import logging
from tests.commands import ROOT


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
def test_duration_format(seconds, text):
    assert logging.duration(seconds) == text


def test_progress_rate_since_previous_line(monkeypatch):
    now = iter([0.0, 10.0, 15.0])
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(now))
    progress = logging.Progress(total=1000, done=100)
    assert progress.line(200) == "200/1000 steps, 10 steps/s, 1m20s left"
    assert progress.line(600) == "600/1000 steps, 80 steps/s, 5s left"


def test_progress_without_rate_has_no_time_left():
    assert logging.Progress(10, unit="scenes").line(0) == "0/10 scenes"


def test_log_info_goes_through_logging(caplog):
    logging.log_info("hello")
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", "hello")]


def test_log_info_is_of_process_zero_and_warnings_of_all(caplog, monkeypatch):
    monkeypatch.setattr(logging.jax.distributed, "is_initialized", lambda: True)
    for index in (0, 1):
        monkeypatch.setattr(logging.jax, "process_index", lambda index=index: index)
        logging.log_info(f"info of {index}")
        logging.log_warning(f"warning of {index}")
    assert caplog.messages == ["info of 0", "warning of 0", "warning of 1"]


def test_log_lines_of_several_processes_name_theirs(monkeypatch):
    monkeypatch.setattr(logging, "_process", "")  # restored afterwards
    logging.set_process(3, 64)
    assert format_record("lvm").endswith(" W [p3/64] careful")


def test_tracebacks_of_libraries_are_for_debugging(monkeypatch):
    with pytest.raises(ValueError, match="odd") as error:
        raise ValueError("odd")
    monkeypatch.setattr(logging._LOGGER, "level", INFO)
    assert "ValueError: odd" in format_record("lvm", error)
    assert format_record("orbax", error).endswith(" W orbax: careful")
    logging._LOGGER.setLevel(DEBUG)
    assert "ValueError: odd" in format_record("orbax", error)


def format_record(logger, error=None):
    record = LogRecord(logger, WARNING, "file.py", 1, "careful", (), error and (error.type, error.value, error.tb))
    return logging._Formatter().format(record)


LEVELS = """
import logging, sys
from lvm.common.logging import configure, log_info, log_warning
configure(quiet="quiet" in sys.argv, verbose="verbose" in sys.argv)
log_info("ours 100%")
log_warning("careful")
logging.getLogger("lvm").debug("detail")
logging.getLogger("orbax").warning("theirs")
logging.getLogger("orbax").info("chatter")
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("", ["I ours 100%", "W careful", "W orbax: theirs"]),
        ("quiet", ["W careful", "W orbax: theirs"]),
        ("verbose", ["I ours 100%", "W careful", "D detail", "W orbax: theirs", "I orbax: chatter"]),
    ],
)
def test_configure_levels_and_format(mode, expected):
    command = [sys.executable, "-c", LEVELS, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in done.stderr.splitlines()] == expected
