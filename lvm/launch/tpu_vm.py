"""Runs on TPU VMs: a queued resource, whose hosts start the run at every boot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from lvm.common import distributed, errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import shell
from lvm.launch.request import ClusterConfig, Request, Submitted
from lvm.launch.shell import Command, CommandError

SITE_KEYS = ("project", "zone", "runtime_version", "service_account")
SCRIPT, CREATE = "startup.sh", "create.json"
_LOG = "/var/log/lvm.log"
# cloud.google.com/tpu/docs/runtimes
_RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_GONE = ("SUSPENDED", "SUSPENDING", "FAILED")


def check(request: Request) -> None:
    """Raises UserError for what a TPU VM can't run."""
    request.site.need("project", "zone")
    if request.slice is None or request.slice.accelerator.platform != "tpu":
        raise UserError("--accelerator: wanted a slice of TPUs, such as v5litepod-256")
    if not request.workdir.startswith("gs://"):
        raise UserError(f"--workdir: {request.workdir}: hosts share nothing but storage; wanted gs://…")


def files(request: Request) -> dict[str, str]:
    """The script that every host runs at every boot, and the command that asks for the hosts, for `watch`."""
    return {SCRIPT: _script(request), CREATE: json.dumps(_create(request), indent=1) + "\n"}


def submit(request: Request) -> list[Command]:
    """What creates the run, in the folder of its files."""
    archive = f"{request.commit}.tar.gz"
    return [
        ["gcloud", "storage", "cp", archive, SCRIPT, CREATE, f"{request.folder}/"],
        _create(request),
        # What hosts of an earlier run of this name left would end this one's `watch`. `rm` wants one to be there.
        ["gcloud", "storage", "cp", CREATE, f"{request.folder}/ended-before"],
        ["gcloud", "storage", "rm", f"{request.folder}/ended-*"],
    ]


def _create(request: Request) -> list[str]:
    assert request.slice is not None
    site, generation = request.site, request.slice.generation
    one = [f"--node-id={request.run}"]
    several = [f"--node-count={request.slices}", f"--node-prefix={request.run}"]
    capacity = {
        "on-demand": [],
        "spot": ["--spot"],
        "reserved": ["--reserved"],
        "queued": ["--valid-until-duration=7d"],
    }
    return [
        *_resources(site, "create", request.run),
        *(one if request.slices == 1 else several),
        f"--accelerator-type={request.slice.accelerator_type}",
        f"--runtime-version={site.runtime_version or _RUNTIMES[generation]}",
        f"--metadata-from-file=startup-script={SCRIPT}",
        "--labels=made-by=lvm",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *([f"--service-account={site.service_account}"] if site.service_account else []),
        *capacity[request.capacity],
    ]


def status(run: Submitted) -> Command:
    return [*_resources(run.site, "describe", run.run), "--format=yaml(name,state,tpu)"]


def logs(run: Submitted) -> Command:
    """The last lines of every host's log. Several slices have a node each: `RUN-0` is the first."""
    tail = f"--command=tail -n 200 {_LOG}"
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", run.run, *_where(run.site), "--worker=all", tail]


def cancel(run: Submitted) -> Command:
    return [*_resources(run.site, "delete", run.run), "--force", "--quiet"]


def listing(run: Submitted) -> Command:
    columns = "--format=table(name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType)"
    return ["gcloud", "compute", "tpus", "queued-resources", "list", *_where(run.site), columns]


def watch(run: Submitted, poll: float) -> int:
    """Makes the run's hosts anew whenever they were preempted, until the run has ended; then gives them back.

    Returns:
      The run's exit code.

    Raises:
      CommandError: what isn't mended by trying again.
    """
    if not (run.folder / CREATE).exists():
        shell.run(
            ["gcloud", "storage", "cp", f"{_folder(run)}/{SCRIPT}", f"{_folder(run)}/{CREATE}", "."],
            run.folder,
        )
    again = json.loads((run.folder / CREATE).read_text())
    shown = ""

    def look() -> int | None:
        nonlocal shown
        code = _exit_code(run)
        if code is not None:
            log_info(f"{run.run}: ended with exit code {code}; giving its hosts back")
            shell.run(cancel(run), run.folder)
            return code
        state = _state(run)
        if state != shown:
            log_info(f"{run.run}: {state}")
            shown = state
        if state in _GONE:
            shell.run(cancel(run), run.folder)
            state = "deleted"
        if state == "deleted":
            log_info(f"{run.run}: asking for its hosts again")
            shell.run(again, run.folder)
            shown = ""
        return None

    return shell.watch(look, poll)


def _state(run: Submitted) -> str:
    """Of the queued resource; "deleted" where there is none."""
    command = [*_resources(run.site, "describe", run.run), "--format=json(state)"]
    try:
        return json.loads(shell.run(command, run.folder, quiet=True))["state"]["state"]
    except CommandError as error:
        if "NOT_FOUND" in error.output:
            return "deleted"
        raise


def _exit_code(run: Submitted) -> int | None:
    """Of the run: the highest that a host left when it had ended for good; None as long as none has."""
    try:
        said = shell.run(["gcloud", "storage", "cat", f"{_folder(run)}/ended-*"], run.folder, quiet=True)
    except CommandError as error:
        if "matched no objects" in error.output or "NOT_FOUND" in error.output:
            return None
        raise
    return max(map(int, said.split()))


def _folder(run: Submitted) -> str:
    if not run.workdir:
        raise UserError("--workdir: not given; what a run needs to be made anew is in it")
    return f"{run.workdir.rstrip('/')}/launch/{run.run}"


def _resources(site: ClusterConfig, verb: str, run: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, run, *_where(site)]


def _where(site: ClusterConfig) -> list[str]:
    site.need("project", "zone")
    return [f"--project={site.project}", f"--zone={site.zone}"]


def _script(request: Request) -> str:
    """Bash. Values are quoted, so that nothing in them is ever run; secrets are read when they are needed."""
    quoted = {
        name: shlex.quote(text) for name, text in (("archive", request.archive), ("folder", request.folder))
    }
    secrets = [
        f'  {name}="$(gcloud secrets versions access latest --secret={shlex.quote(where)})" || return 1\n'
        f"  export {name}"
        for name, where in request.secrets.items()
    ]
    lines: Sequence[str] = [
        "#!/bin/bash",
        f"# Run {request.run}: every host runs this at every boot, and goes on from the newest checkpoint.",
        "set -uo pipefail",
        f"exec >>{_LOG} 2>&1",
        f"mkdir -p /opt/lvm/{request.run}",
        f"cd /opt/lvm/{request.run} || exit 1",
        "export HOME=/root UV_INSTALL_DIR=/opt/lvm/bin",
        "if [ -e ended ]; then exit 0; fi",
        "prepare() {",
        *secrets,
        "  if [ -e ready ]; then return 0; fi",
        f'  gcloud storage rm {quoted["folder"]}/ended-"$(hostname)"',
        "  rm -rf code environment && mkdir code || return 1",
        f"  gcloud storage cp {quoted['archive']} code.tar.gz || return 1",
        "  tar -xzf code.tar.gz -C code || return 1",
        "  curl -LsSf https://astral.sh/uv/install.sh | sh || return 1",
        "  /opt/lvm/bin/uv venv --python 3.12 environment || return 1",
        "  /opt/lvm/bin/uv pip install --python environment/bin/python -r code/requirements.txt 'jax[tpu]' || return 1",
        "  touch ready",
        "}",
        'until prepare; do echo "this host is not ready; trying again"; sleep 60; done',
        *shell.exports(request.environment),
        f"export {distributed.COORDINATOR}=auto",
        "cd code || exit 1",
        *_restarts(request),
        'echo "$code" >../ended',
        f'gcloud storage cp ../ended {quoted["folder"]}/ended-"$(hostname)"',
    ]
    return "\n".join(lines) + "\n"


def _restarts(request: Request) -> list[str]:
    """Runs it until it has ended for good. To be preempted is no failure."""
    once = [
        f"../environment/bin/python {shlex.join(request.command)}",
        "code=$?",
        'echo "ended with exit code $code"',
    ]
    if not request.max_restarts:
        return once
    final = "|".join(str(code) for code in errors.FINAL)
    return [
        "failures=0",
        "while true; do",
        *(f"  {line}" for line in once),
        f'  case "$code" in {final}) break ;; esac',
        f'  if [ "$code" != {errors.EXIT_PREEMPTED} ]; then failures=$((failures + 1)); fi',
        f'  if [ "$failures" -gt {request.max_restarts} ]; then break; fi',
        "  sleep 10",
        "done",
    ]
