"""Polling of a submitted run."""

import pytest

from lvm.launch import shell
from lvm.launch.shell import CommandError


def check(*results):
    """A `check` for `shell.watch` that returns, or raises, these in turn."""
    left = iter(results)

    def next_result():
        result = next(left)
        if isinstance(result, CommandError):
            raise result
        return result

    return next_result


FAILURE = CommandError("gcloud: failed", "")


def test_watch_gives_up_after_five_failures_in_a_row():
    few = [FAILURE] * 4
    assert shell.watch("a", check(*few, ("RUNNING", None), *few, ("ENDED", 65)), poll=0) == 65
    with pytest.raises(CommandError, match="gcloud"):
        shell.watch("a", check(*few, FAILURE, ("ENDED", 0)), poll=0)


def test_watch_logs_each_state_once(caplog):
    states = [("PENDING", None)] * 3 + [("RUNNING", None), FAILURE, ("RUNNING", None), ("RUNNING", 0)]
    assert shell.watch("a", check(*states), poll=0) == 0
    assert caplog.messages == ["a: PENDING", "a: RUNNING", "gcloud: failed; retrying"]
