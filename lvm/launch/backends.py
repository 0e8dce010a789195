"""Where runs go, by name: one way to submit to them all and to look after what is there."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import code, gke, local, shell, slurm, tpu_vm
from lvm.launch.local import Supervisor
from lvm.launch.request import ClusterConfig, Request, Submitted
from lvm.launch.shell import CommandError

LOCAL = "local"
# Each has check, files and submit for a request; status, logs, cancel, listing and watch for what was submitted.
_REMOTE: dict[str, Any] = {"tpu-vm": tpu_vm, "gke": gke, "slurm": slurm}
NAMES = (LOCAL, *_REMOTE)
# The keys of a site that each place takes.
SITE_KEYS = {LOCAL: (), **{name: place.SITE_KEYS for name, place in _REMOTE.items()}}
_RECORD = "submitted.json"


@dataclasses.dataclass(frozen=True)
class SubmitOptions:
    """How a run is submitted.

    Attributes:
      commit: the code, "" for what is checked out.
      ship_changes: see `code.commit`.
      plan: whether `lvm.plan` must find that it fits.
      dry_run: whether commands are printed and not run.
    """

    commit: str = ""
    ship_changes: bool = False
    plan: bool = True
    dry_run: bool = False


def submit(on: str, request: Request, folder: Path, options: SubmitOptions) -> None:
    """Writes a run's files into `folder`, and sends it off.

    Raises:
      UserError: the place can't run it, it doesn't fit, or a command failed.
    """
    place = _REMOTE[on]
    place.check(request)
    if on == "slurm" and not options.dry_run:
        _check_secrets(request)  # Slurm hands on what is there now, and a job may begin in days
    request = dataclasses.replace(request, commit=code.commit(options.commit, options.ship_changes))
    if options.plan:
        _plan(request)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in place.files(request).items():
        (folder / name).write_text(text)
    changes = code.changes(request.commit)
    (folder / "changes.diff").unlink(missing_ok=True)  # of a submission before
    if changes:
        (folder / "changes.diff").write_text(changes)
    record = {"on": on, "workdir": request.workdir, "commit": request.commit}
    files.write_json(folder / _RECORD, {**record, "site": dataclasses.asdict(request.site)})
    shell.run(code.archive_command(request.commit, folder / f"{request.commit}.tar.gz"), folder)
    if options.dry_run:
        print(f"cd {shell.show([str(folder)])}")
    for command in place.submit(request):
        if options.dry_run:
            print(shell.show(command))
        else:
            shell.run(command, folder)
    if not options.dry_run:
        log_info(
            f"{request.run}: submitted; `python -m lvm.submit status --on={on} --run={request.run}` asks for it"
        )


def run_here(request: Request, folder: Path, processes: int, grace: float, dry_run: bool) -> int:
    """Runs it on this machine, in the foreground, and returns its exit code."""
    _check_secrets(request)
    if dry_run:
        for line in shell.exports(request.environment):
            print(line)
        print(f"# {processes} processes of")
        print(shell.show([sys.executable, *request.command]))
        return 0
    secrets = {name: os.environ[where] for name, where in request.secrets.items()}
    environment = {**request.environment, **secrets}
    place = local.LocalRun(folder)  # whose lock is held while it lives
    with place.hold() as log:
        files.write_json(folder / _RECORD, {"on": LOCAL, "workdir": request.workdir})
        run = Supervisor(request.command, processes, request.max_restarts, grace, environment, log)
        return run.run()


def _check_secrets(request: Request) -> None:
    missing = [where for where in request.secrets.values() if where not in os.environ]
    if missing:
        raise UserError(
            f"--secret: {', '.join(missing)}: not in the environment, which is where secrets are here"
        )


def _plan(request: Request) -> None:
    """Refuses what doesn't fit: as `lvm.plan` says it, with the nearest that does."""
    if request.slice is None:
        log_info("no plan: without --accelerator nobody knows the memory")
        return
    for arguments in request.sweep or ((),):
        name = request.slice.libtpu_name or request.slice.name
        where = [f"--topology={name}", f"--slices={request.slices}"]
        command = [sys.executable, "-m", "lvm.plan", *request.job, *arguments, *where]
        log_info(f"planning: {shell.show(command)}")
        try:
            shell.run(command, Path.cwd())
        except CommandError as error:
            said = [line for line in error.output.splitlines() if line.startswith("error: ")]
            if not said:
                raise
            raise UserError(said[-1].removeprefix("error: ")) from error


def find(on: str, run: str, given: ClusterConfig, folder: Path, workdir: str) -> Submitted:
    """A run as it was submitted from here; what is not known here is what was given."""
    folder.mkdir(parents=True, exist_ok=True)
    site = given
    if (folder / _RECORD).exists():
        record = files.read_json(folder / _RECORD)
        if record["on"] != on:
            raise UserError(f"--on: {on}, but {run} was submitted to {record['on']} ({folder})")
        if given == ClusterConfig() and on != LOCAL:
            site = ClusterConfig(**record["site"])
        workdir = workdir or record["workdir"]
    return Submitted(run, site, folder, workdir)


def manage(verb: str, on: str, run: Submitted, poll: float) -> int:
    """`status`, `logs`, `cancel`, `list` or `watch`; returns the exit code."""
    if on == LOCAL:
        return _look_after_local(verb, run, poll)
    place = _REMOTE[on]
    if verb == "watch":
        return place.watch(run, poll)
    asked: dict[str, Any] = {
        "status": place.status,
        "logs": place.logs,
        "cancel": place.cancel,
        "list": place.listing,
    }
    shell.run(asked[verb](run), run.folder)
    return 0


def _look_after_local(verb: str, run: Submitted, poll: float) -> int:
    if verb == "list":
        for folder in sorted(run.folder.glob("*/log.txt")):
            print(f"{folder.parent.name}: {_state(local.LocalRun(folder.parent))}")
        return 0
    place = local.LocalRun(run.folder)
    if not place.log.exists():
        raise UserError(f"{run.run}: no run of this name was submitted to this machine ({run.folder})")
    if verb == "logs":
        print("".join(place.log.read_text().splitlines(keepends=True)[-200:]), end="")
    elif verb == "status":
        print(f"{run.run}: {_state(place)}; it lives in {run.workdir}")
    elif verb == "watch":
        while place.pid() is not None:
            time.sleep(poll)
        print(f"{run.run}: {_state(place)}")
    else:
        pid = place.pid()
        if pid is None:
            raise UserError(f"{run.run}: has ended already")
        os.kill(pid, signal.SIGTERM)
        print(f"{run.run}: told to save and end")
    return 0


def _state(place: local.LocalRun) -> str:
    pid = place.pid()
    return "has ended" if pid is None else f"running, process {pid}"
