"""What every command shares: list flags, errors as one line, exit codes."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.cli import positionals_to_flags, spread_list_flags
from tests.commands import ROOT

SCRIPT = """
import errno
from absl import flags
from lvm import cli
from lvm.common.errors import DivergedError, UserError

OUTCOME = flags.DEFINE_enum("outcome", "done", ["done", "user", "diverged", "disk", "interrupt", "exit", "bug"], "")
PAIRS = flags.DEFINE_multi_string("pairs", [], "")

def main():
    print("pairs", PAIRS.value)
    match OUTCOME.value:
        case "user": raise UserError("config.x: 3 is wrong")
        case "diverged": raise DivergedError("the loss is nan")
        case "disk": raise OSError(errno.ENOSPC, "No space left on device", "/some/file")
        case "interrupt": raise KeyboardInterrupt
        case "exit": raise SystemExit(75)
        case "bug": raise RuntimeError("a bug")

cli.run(main, ["pairs"])
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", "--pairs", "a", "b", "--out=c"], ["run", "--pairs=a", "--pairs=b", "--out=c"]),
        (["run", "--pairs=a", "b"], ["run", "--pairs=a", "--pairs=b"]),
        (["run", "--pairs", "a=b", "-1"], ["run", "--pairs=a=b", "--pairs=-1"]),
        (["run", "--out", "c", "d"], ["run", "--out", "c", "d"]),
        (["run", "--pairs", "a", "--out", "c"], ["run", "--pairs=a", "--out", "c"]),
    ],
)
def test_list_flags_take_all_values_up_to_the_next_flag(argv, expected):
    assert spread_list_flags(argv, ["pairs"]) == expected


@given(st.lists(st.text()))
def test_without_list_flags_nothing_changes(argv):
    assert spread_list_flags(argv, []) == argv


def test_a_command_that_ends_well_exits_0_with_its_list_flags_read():
    done = run("--pairs", "a", "b", "--outcome=done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "pairs ['a', 'b']\n", "")


@pytest.mark.parametrize(
    ("outcome", "code", "error"),
    [
        ("user", 2, "error: config.x: 3 is wrong\n"),
        ("diverged", 65, "error: the loss is nan\n"),
        ("disk", 1, "error: No space left on device: /some/file\n"),
        ("interrupt", 130, "error: interrupted\n"),
        ("exit", 75, ""),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(outcome, code, error):
    ended = run(f"--outcome={outcome}")
    assert (ended.returncode, ended.stderr) == (code, error)
    assert ended.stdout == "pairs []\n"  # what was said before is not lost


def test_a_bug_keeps_its_traceback_and_exits_1():
    ended = run("--outcome=bug")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "a bug" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--outcme=done"], "outcme"), (["--outcome=no"], "outcome"), (["stray"], "stray")],
)
def test_a_wrong_flag_is_one_line_that_names_it(arguments, named):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert named in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["A", "B", "--v=2"],
        ["--v", "2", "A", "B"],
        ["A", "--v", "2", "B"],
        ["--v=2", "A", "B"],
        ["A", "--only_check_args", "B", "--v", "2"],
    ],
)
def test_positions_may_stand_anywhere(argv):
    """Flags of absl itself: `v` takes a value, `only_check_args` is a switch."""
    named = positionals_to_flags(["convert", *argv], ("src", "dst"))
    others = ("--v", "2", "--v=2", "--only_check_args")
    assert [a for a in named if a not in others] == ["convert", "--src=A", "--dst=B"]
    left = positionals_to_flags(["convert", "A", "B", "C"], ("src", "dst"))
    assert left[-1] == "C"  # for the parser to refuse
