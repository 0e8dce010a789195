"""TPU VM backend: a run is a queued resource, whose hosts start the run at every boot."""

import json
import shlex

from lvm.common import distributed
from lvm.common.errors import UserError
from lvm.launch import shell
from lvm.launch.requests import ClusterConfig, Request, SubmittedRun
from lvm.launch.shell import Command, CommandError

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
_CAPACITY_FLAGS = {
    "on-demand": [],
    "spot": ["--spot"],
    "reserved": ["--reserved"],
    "queued": ["--valid-until-duration=7d"],
}
_LOST = ("SUSPENDED", "SUSPENDING", "FAILED")


def validate(request: Request) -> None:
    """Raises UserError for a request that TPU VMs cannot run."""
    request.site.require("project", "zone")
    request.require_gcs_workdir()
    if request.hardware.accelerator.platform != "tpu":
        raise UserError(f"--accelerator={request.hardware.name}: use a TPU slice such as v5litepod-256")


def files(request: Request) -> dict[str, str]:
    """The startup script of every host, and the command that creates the queued resource, for `watch`."""
    return {SCRIPT: _script(request), CREATE: json.dumps(_create(request), indent=1) + "\n"}


def submit(request: Request) -> list[Command]:
    folder = request.launch_folder
    return [
        ["gcloud", "storage", "cp", f"{request.commit}.tar.gz", SCRIPT, CREATE, f"{folder}/"],
        _create(request),
        # Exit codes of an earlier run of this name would end `watch`; `rm` fails unless there is at least one.
        ["gcloud", "storage", "cp", CREATE, f"{folder}/ended-before"],
        ["gcloud", "storage", "rm", f"{folder}/ended-*"],
    ]


def _create(request: Request) -> list[str]:
    site = request.site
    if request.slices == 1:
        nodes = [f"--node-id={request.name}"]
    else:
        nodes = [f"--node-count={request.slices}", f"--node-prefix={request.name}"]
    return [
        *_queued_resources(site, "create", request.name),
        *nodes,
        f"--accelerator-type={request.hardware.accelerator_type}",
        f"--runtime-version={site.runtime_version or _RUNTIMES[request.hardware.generation]}",
        f"--metadata-from-file=startup-script={SCRIPT}",
        "--labels=made-by=lvm",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *([f"--service-account={site.service_account}"] if site.service_account else []),
        *_CAPACITY_FLAGS[request.capacity],
    ]


def status(run: SubmittedRun) -> Command:
    return [*_queued_resources(run.site, "describe", run.name), "--format=yaml(name,state,tpu)"]


def logs(run: SubmittedRun) -> Command:
    """The last lines of every host's log. With several slices, each is a node: `RUN-0` is the first."""
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", run.name, *_location(run.site)]
    return [*ssh, "--worker=all", f"--command=tail -n 200 {_LOG}"]


def cancel(run: SubmittedRun) -> Command:
    return [*_queued_resources(run.site, "delete", run.name), "--force", "--quiet"]


def list_runs(run: SubmittedRun) -> Command:
    columns = "--format=table(name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType)"
    return [*_queued_resources(run.site, "list"), columns]


def watch(run: SubmittedRun, poll: float) -> int:
    """Requests the run's hosts again whenever they are preempted, until the run has ended; then releases them.

    Returns:
      The run's exit code.

    Raises:
      CommandError: a command keeps failing.
    """
    if not (run.folder / CREATE).exists():
        paths = [f"{run.launch_folder}/{name}" for name in (SCRIPT, CREATE)]
        shell.run(["gcloud", "storage", "cp", *paths, "."], run.folder)
    create = json.loads((run.folder / CREATE).read_text("utf-8"))

    previous: list[int] = []

    def check() -> tuple[str, int | None]:
        nonlocal previous
        before, previous = previous, _exit_codes(run)
        if previous and previous != before:
            return "ending", None  # other hosts may still be saving
        if previous:
            shell.run(cancel(run), run.folder)
            return f"ended with exit code {max(previous)}; hosts released", max(previous)
        state = _state(run)
        if state in _LOST:
            shell.run(cancel(run), run.folder)
        if state in (*_LOST, "deleted"):
            shell.run(create, run.folder)
            state = f"{state}; requested again"
        return state, None

    return shell.watch(run.name, check, poll)


def _state(run: SubmittedRun) -> str:
    """State of the queued resource; "deleted" if there is none."""
    described = _query(run, [*_queued_resources(run.site, "describe", run.name), "--format=json(state)"])
    return "deleted" if described is None else json.loads(described)["state"]["state"]


def _exit_codes(run: SubmittedRun) -> list[int]:
    """The exit codes that hosts have uploaded, none while the run goes on."""
    codes = _query(run, ["gcloud", "storage", "cat", f"{run.launch_folder}/ended-*"])
    return [int(code) for code in (codes or "").split()]


def _query(run: SubmittedRun, command: Command) -> str | None:
    """Output of a command; None if the resource does not exist."""
    try:
        return shell.run(command, run.folder, quiet=True)
    except CommandError as error:
        if "NOT_FOUND" in error.output or "matched no objects" in error.output:
            return None
        raise


def _queued_resources(site: ClusterConfig, *command: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", *command, *_location(site)]


def _location(site: ClusterConfig) -> list[str]:
    site.require("project", "zone")
    return [f"--project={site.project}", f"--zone={site.zone}"]


def _script(request: Request) -> str:
    """The startup script, in bash. Values are quoted; secrets are read at run time."""
    secrets = [
        f'  {name}="$(gcloud secrets versions access latest --secret={shlex.quote(source)})" || return 1\n'
        f"  export {name}"
        for name, source in request.secrets.items()
    ]
    return shell.render_script(
        "tpu_vm_startup.sh",
        name=request.name,
        log=_LOG,
        secrets="\n".join(secrets),
        folder=shlex.quote(request.launch_folder),
        archive=shlex.quote(request.archive),
        exports=shell.export_lines({**request.environment, distributed.COORDINATOR: "auto"}),
        command=shlex.join(request.supervised_command),
    )
