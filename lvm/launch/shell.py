"""The commands of other programs: run, or printed as they would run; and what their failures mean in clear words."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvm.common.errors import UserError
from lvm.common.logging import log_info

Command = Sequence[str]
_FAILURES = 5  # in a row, that end a watch

_INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "`gcloud components install kubectl`",
    "sbatch": "Slurm's commands: submit from a login node of the cluster",
}
# What a program says → what it means; the first that is found counts.
_MEANINGS = (
    (
        r"[Qq]uota|QUOTA_EXCEEDED",
        "the quota doesn't allow this: ask for more of it, or take fewer or other chips",
    ),
    (
        r"no more capacity|stockout|RESOURCE_EXHAUSTED",
        "there is no capacity now: try --queued, another zone, or later",
    ),
    (r"preempted|SUSPENDED", "it was preempted: `submit watch` makes it anew"),
    (
        r"ALREADY_EXISTS|AlreadyExists|already exists",
        "a run of this name exists: cancel it, or choose another --run",
    ),
    (r"NOT_FOUND|NotFound|not found|Invalid job id|does not exist", "there is no such thing there"),
    (
        r"PERMISSION_DENIED|Forbidden|forbidden|[Aa]ccess denied|Invalid account",
        "it isn't allowed to this account",
    ),
    (
        r"gcloud auth login|credentials|Unauthorized|You must be logged in",
        "log in first: `gcloud auth login`",
    ),
    (r"invalid partition|Requested node configuration", "the partition or its nodes don't exist like this"),
)


class CommandError(UserError):
    """A program that was run ended with an error. `output` is what it said."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def run(command: Command, folder: Path, quiet: bool = False) -> str:
    """Runs a command to its end and returns what it printed.

    Args:
      command: program and arguments, as they are: no shell reads them.
      folder: where it runs.
      quiet: whether its output is only returned, and not shown as well.

    Raises:
      UserError: the program isn't installed.
      CommandError: it ended with an error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    except FileNotFoundError as error:
        where = _INSTALL.get(command[0], "install it")
        raise UserError(f"{command[0]} isn't installed: {where}") from error
    if done.returncode:
        raise CommandError(explain(command, done.stderr or done.stdout), done.stderr + done.stdout)
    if not quiet and done.stdout:
        print(done.stdout.rstrip("\n"), flush=True)
    return done.stdout


def watch(look: Callable[[], int | None], poll: float) -> int:
    """Looks every `poll` seconds until a look returns an exit code.

    Raises:
      CommandError: a program failed many times in a row; the first times may be the network's.
    """
    failures = 0
    while True:
        try:
            code = look()
            failures = 0
        except CommandError as error:
            failures += 1
            if failures == _FAILURES:
                raise
            log_info(f"{error}; asking again")
            code = None
        if code is not None:
            return code
        time.sleep(poll)


def explain(command: Command, output: str) -> str:
    """One line about a failure: what it means, and what the program said last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = lines[-1][:300] if lines else "it said nothing"
    name = " ".join([word for word in command if not word.startswith("-")][:4])
    meaning = next((words for pattern, words in _MEANINGS if re.search(pattern, output)), "it failed")
    return f"{name}: {meaning} ({said})"


def show(command: Command) -> str:
    """The command as one would type it."""
    return shlex.join(command)


def exports(environment: Mapping[str, str]) -> list[str]:
    """Lines of bash that set variables to these values, whatever is in them."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
