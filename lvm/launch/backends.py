"""Backends by name, with one interface to submit to them and to manage what was submitted."""

import dataclasses
import datetime
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import code, gke, local, shell, slurm, tpu_vm
from lvm.launch.requests import ClusterConfig, EncodeRequest, Request, SubmittedRun, SweepRequest
from lvm.launch.shell import Command, CommandError


class Backend(Protocol):
    """Interface of the remote backends' modules.

    `files` are written into the run's local folder, where the commands of `submit` run. `status`, `logs`, `cancel` and
    `list_runs` return one command each. `watch` blocks until the run has ended and returns its exit code.
    """

    def validate(self, request: Request) -> None: ...
    def files(self, request: Request) -> dict[str, str]: ...
    def submit(self, request: Request) -> list[Command]: ...
    def status(self, run: SubmittedRun) -> Command: ...
    def logs(self, run: SubmittedRun) -> Command: ...
    def cancel(self, run: SubmittedRun) -> Command: ...
    def list_runs(self, run: SubmittedRun) -> Command: ...
    def watch(self, run: SubmittedRun, poll: float) -> int: ...


LOCAL = "local"
_REMOTE: dict[str, Backend] = {"tpu-vm": tpu_vm, "gke": gke, "slurm": slurm}
NAMES = (LOCAL, *_REMOTE)
SCHEDULERS = ("slurm", "gke")  # which distribute an encoding's groups of shards; elsewhere processes claim shards
_RECORD = "submitted.json"


def submit(backend: str, request: Request, folder: Path, ship_changes: bool, plan: bool, dry_run: bool) -> None:
    """Writes a run's files into `folder` and submits the run.

    Args:
      backend: one of `NAMES` except `LOCAL`.
      request: its commit may be any revision.
      folder: created unless it exists.
      ship_changes: see `code.resolve_commit`.
      plan: submits only what fits by `lvm.plan`.
      dry_run: prints commands instead of running them.

    Raises:
      UserError: the backend cannot run the request, it does not fit, or a command failed.
    """
    _REMOTE[backend].validate(request)
    if backend == "slurm" and not dry_run:
        _require_secrets(request)  # Slurm passes on the submitting environment
    request = dataclasses.replace(request, commit=code.resolve_commit(request.commit, ship_changes))
    if plan:
        _check_plan(request)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _REMOTE[backend].files(request).items():
        (folder / name).write_text(text, "utf-8")
    (folder / "changes.diff").unlink(missing_ok=True)  # of an earlier submission
    if diff := code.uncommitted_diff(request.commit):
        (folder / "changes.diff").write_text(diff, "utf-8")
    site = dataclasses.asdict(request.site)
    files.write_json(folder / _RECORD, {**_record(backend, request), "commit": request.commit, "site": site})
    shell.run(code.archive_command(request.commit, folder / f"{request.commit}.tar.gz"), folder)
    commands = _REMOTE[backend].submit(request)
    if dry_run:
        print("\n".join(map(shlex.join, [["cd", str(folder)], *commands])))
        return
    for command in commands:
        shell.run(command, folder)
    log_info(f"{request.name}: submitted; see `lvm submit status --on={backend} --run={request.name}`")


def run_local(
    request: Request, folder: Path, processes: int, grace: float, progress: Callable[[], int], dry_run: bool
) -> int:
    """Runs on this machine in the foreground; returns the exit code. Arguments as of `local.Supervisor`."""
    _require_secrets(request)
    if dry_run:
        lines = [shell.export_lines(request.environment), f"# {processes} processes of"]
        print("\n".join(filter(None, [*lines, shlex.join([sys.executable, *request.command])])))
        return 0
    secrets = {name: os.environ[source] for name, source in request.secrets.items()}
    environment = {**request.environment, **secrets}
    with local.lock_run(folder) as log:
        files.write_json(folder / _RECORD, _record(LOCAL, request))
        unit = "shard" if isinstance(request, EncodeRequest) else "step"
        command, max_restarts = request.command, request.max_restarts
        supervisor = local.Supervisor(command, processes, max_restarts, grace, progress, unit, environment, log)
        return supervisor.run()


def _record(backend: str, request: Request) -> dict[str, Any]:
    """Content of `_RECORD`, without what only remote backends need."""
    store = {"store": request.store} if isinstance(request, EncodeRequest) else {}
    sweep = {"sweep": request.folder} if isinstance(request, SweepRequest) else {}
    return {"on": backend, "workdir": request.workdir, **store, **sweep}


def _require_secrets(request: Request) -> None:
    missing = [source for source in request.secrets.values() if source not in os.environ]
    if missing:
        raise UserError(f"--secret: {', '.join(missing)} not set in the environment")


def _check_plan(request: Request) -> None:
    """Raises the error of `lvm.plan` if the run does not fit."""
    if request.slice is None:
        log_info("not planned: --accelerator is not set")
        return
    topology = request.slice.libtpu_name or request.slice.name
    for arguments in request.sweep or ((),):
        target = [f"--topology={topology}", f"--slices={request.slices}"]
        command = [sys.executable, "-m", "lvm.plan", *request.train_arguments, *arguments, *target]
        log_info(f"planning: {shlex.join(command)}")
        try:
            shell.run(command, Path.cwd())
        except CommandError as error:
            messages = [line for line in error.output.splitlines() if line.startswith("error: ")]
            if not messages:
                raise
            raise UserError(messages[-1].removeprefix("error: ")) from error


def load_submitted(backend: str, name: str, site: ClusterConfig, folder: Path, workdir: str) -> SubmittedRun:
    """A submitted run by the record in `folder`; `site` and `workdir` take precedence over it if set."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _RECORD).exists():
        record = files.read_json(folder / _RECORD)
        if record["on"] != backend:
            raise UserError(f"--on={backend}, but {name} was submitted to {record['on']} ({folder})")
        if site == ClusterConfig() and backend != LOCAL:
            site = ClusterConfig(**record["site"])
        since = datetime.datetime.fromtimestamp((folder / _RECORD).stat().st_mtime).isoformat(timespec="seconds")
        store, sweep = (record.get(key, "") for key in ("store", "sweep"))
        return SubmittedRun(name, workdir or record["workdir"], site, folder, store, sweep, since)
    return SubmittedRun(name, workdir, site, folder)


def manage(verb: str, backend: str, run: SubmittedRun, poll: float) -> int:
    """Executes `status`, `logs`, `cancel`, `list` or `watch`; returns the exit code."""
    if backend == LOCAL:
        local.manage(verb, run, poll)
        return 0
    remote = _REMOTE[backend]
    if verb == "watch":
        return remote.watch(run, poll)
    commands = {"status": remote.status, "logs": remote.logs, "cancel": remote.cancel, "list": remote.list_runs}
    shell.run(commands[verb](run), run.folder)
    return 0
