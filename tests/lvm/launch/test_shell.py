"""Polling of a submitted run."""

import shlex

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


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "ERROR: (gcloud) no project is set\nTo unset it, run:\n  $ gcloud config unset project\n",
            "ERROR: (gcloud) no project is set",
        ),
        ("submitting\nsbatch: no such partition\n", "sbatch: no such partition"),
        ("", "no output"),
    ],
)
def test_failed_command_is_told_by_its_error(output, message, tmp_path):
    with pytest.raises(CommandError) as caught:
        shell.run(["sh", "-c", f"printf %s {shlex.quote(output)} >&2; exit 1"], tmp_path)
    assert str(caught.value).endswith(f"({message})")
