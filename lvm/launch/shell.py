"""Commands of external programs: run or printed, with their failures explained."""

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvm.common import errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info

Command = Sequence[str]
_MAX_FAILURES = 5  # consecutive, while polling

_INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "`gcloud components install kubectl`",
    "sbatch": "Slurm's commands: submit from a login node of the cluster",
}
# Pattern in a program's output → explanation; the first match counts.
_EXPLANATIONS = {
    r"[Qq]uota|QUOTA_EXCEEDED": "the quota does not allow this: request more, or use fewer or other chips",
    r"no more capacity|stockout|RESOURCE_EXHAUSTED": "no capacity: try --queued, another zone, or later",
    r"preempted|SUSPENDED": "preempted: `submit watch` requests it again",
    r"ALREADY_EXISTS|AlreadyExists|already exists": "a run of this name exists: cancel it, or use another --run",
    r"NOT_FOUND|NotFound|not found|Invalid job id|does not exist": "not found",
    r"PERMISSION_DENIED|Forbidden|forbidden|[Aa]ccess denied|Invalid account": "this account has no permission",
    r"gcloud auth login|credentials|Unauthorized|You must be logged in": "log in first: `gcloud auth login`",
    r"invalid partition|Requested node configuration": "no such partition, or it has no such nodes",
}


class CommandError(UserError):
    """An external program failed. `output` is what it printed."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def run(command: Command, folder: Path, quiet: bool = False) -> str:
    """Runs a command in `folder`, without a shell; returns its standard output, and prints it unless `quiet`.

    Raises:
      UserError: the program is not installed.
      CommandError: it failed.
    """
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, cwd=folder
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed: {_INSTALL.get(command[0], 'install it')}") from error
    if result.returncode:
        raise CommandError(_explain(command, result.stderr or result.stdout), result.stderr + result.stdout)
    if not quiet and result.stdout:
        print(result.stdout.rstrip("\n"), flush=True)
    return result.stdout


def watch(name: str, check: Callable[[], tuple[str, int | None]], poll: float) -> int:
    """Calls `check` every `poll` seconds and logs the state of the run `name` when it changes.

    `check` returns the state, and the exit code or None. The first exit code ends the calls and is returned.

    Raises:
      CommandError: `check` failed several times in a row.
    """
    failures, last_state = 0, ""
    while True:
        try:
            state, code = check()
        except CommandError as error:
            failures += 1
            if failures == _MAX_FAILURES:
                raise
            log_info(f"{error}; retrying")
        else:
            failures = 0
            if state != last_state:
                log_info(f"{name}: {state}")
            last_state = state
            if code is not None:
                return code
        time.sleep(poll)


def _explain(command: Command, output: str) -> str:
    """One line: the program, an explanation, and the last error that it printed, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    problem = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])
    name = " ".join([word for word in command if not word.startswith("-")][:4])
    matches = (text for pattern, text in _EXPLANATIONS.items() if re.search(pattern, output))
    return f"{name}: {next(matches, 'failed')} ({problem[:300]})"


def export_lines(environment: Mapping[str, str]) -> str:
    """Lines of bash that export these variables, quoted."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


def render_script(template: str, **values: str) -> str:
    """A script of this folder with its `{{key}}` replaced; a line of nothing but an empty value is left out."""
    values |= {"final": "|".join(map(str, errors.FINAL)), "preempted": str(errors.EXIT_PREEMPTED)}

    def replace(match: re.Match[str]) -> str:
        value = values[match[1]]
        return value + match[2] if value else ""

    return re.sub(r"\{\{(\w+)\}\}(\n?)", replace, (Path(__file__).parent / template).read_text("utf-8"))
