"""Slurm backend: a batch script with one process per node or GPU, which requeues itself when preempted."""

import shlex

from lvm.common.errors import UserError
from lvm.launch import shell
from lvm.launch.requests import VARIABLE, ArrayRequest, EncodeRequest, Request, SubmittedRun
from lvm.launch.shell import Command, CommandError

SCRIPT, FINISH = "job.sh", "finish.sh"
_ENCODE_GRACE = 60  # as `_GRACE`, for tasks that save nothing
_GRACE = 300  # seconds before the time limit at which a job receives SIGTERM


def validate(request: Request) -> None:
    """Raises UserError for a request that Slurm cannot run."""
    if request.slice is not None and request.slice.accelerator.platform != "gpu":
        raise UserError(f"--accelerator={request.slice.name}: Slurm takes GPUs, as in h100-64")
    if request.slices > 1:
        raise UserError("--slices: for TPUs; under Slurm use --nodes")
    if request.capacity != "on-demand":
        raise UserError(f"--{request.capacity}: under Slurm, the --partition determines the capacity")
    if isinstance(request, ArrayRequest) and _nodes_and_gpus(request)[0] > 1:
        raise UserError(f"{_nodes_and_gpus(request)[0]} nodes: a worker is one node; --workers is their number")
    for variable in request.secrets.values():
        if not VARIABLE.fullmatch(variable):
            raise UserError(f"--secret: {variable!r} is not an environment variable; Slurm takes secrets from those")
    if not request.workdir.startswith("/"):
        raise UserError(f"--workdir={request.workdir}: use an absolute path that all nodes share")


def files(request: Request) -> dict[str, str]:
    """The batch script; each task of an array job runs one run of a sweep."""
    if isinstance(request, EncodeRequest):
        task = "encodes one group of shards; run again, it skips those that exist"
        return {SCRIPT: _array_script(request, task), FINISH: _finish_script(request)}
    if isinstance(request, ArrayRequest):
        return {SCRIPT: _array_script(request, "trains one run of the sweep; run again, it resumes")}
    return {SCRIPT: _script(request)}


def submit(request: Request) -> list[Command]:
    code, logs = f"{request.launch_folder}/{request.commit}", _log_folder(request.workdir)
    unpack = [["mkdir", "-p", code, logs], ["tar", "-xzf", f"{request.commit}.tar.gz", "-C", code]]
    if not isinstance(request, ArrayRequest):
        return [*unpack, ["sbatch", "--parsable", *_options(request, logs), SCRIPT]]
    limit = f"%{request.parallelism}" if request.parallelism < request.workers else ""
    array = [f"--array=0-{request.workers - 1}{limit}", f"--signal=B:TERM@{_ENCODE_GRACE}"]
    tasks = ["sbatch", "--parsable", *_node_options(request), *_common_options(request, logs), *array, SCRIPT]
    if not isinstance(request, EncodeRequest):
        return [*unpack, tasks]
    # A singleton begins when all tasks of the jobs with its name have ended.
    finish = [*_common_options(request, logs), "--ntasks=1", "--dependency=singleton"]
    return [*unpack, tasks, ["sbatch", "--parsable", *finish, FINISH]]


def status(run: SubmittedRun) -> Command:
    columns = "--format=JobID%20,State%20,ExitCode,Elapsed,NNodes,Start,End"
    # Jobs of this name that ended before the run was submitted are others. The default is midnight.
    return ["sacct", "-X", f"--name={run.name}", f"--starttime={run.since or 'now-30days'}", columns]


def logs(run: SubmittedRun) -> Command:
    if not run.workdir:
        raise UserError("--workdir: required; it has the run's logs")
    pattern = f"{shlex.quote(_log_folder(run.workdir))}/{run.name}-*.out"
    return ["bash", "-c", f"tail -n 200 {pattern}"]


def cancel(run: SubmittedRun) -> Command:
    return ["scancel", "--me", f"--name={run.name}"]


def list_runs(run: SubmittedRun) -> Command:
    return ["squeue", "--me", "--format=%.20i %.40j %.10T %.12M %.6D %R"]


def watch(run: SubmittedRun, poll: float) -> int:
    """Logs the states of the run's jobs until all have ended; jobs requeue themselves.

    Returns:
      0 if all jobs completed, else 1.

    Raises:
      CommandError: a command keeps failing, or Slurm keeps knowing no such job.
    """
    queue = ["squeue", "--me", "--noheader", f"--name={run.name}", "--format=%T"]
    final = [*status(run)[:-1], "--noheader", "--format=State"]

    def check() -> tuple[str, int | None]:
        states = shell.run(queue, run.folder, quiet=True).split()
        if states:
            return " ".join(states), None
        states = shell.run(final, run.folder, quiet=True).split()
        if not states:  # accounting may lag behind the queue
            raise CommandError(f"sacct: no job named {run.name}; see --run", "")
        return " ".join(states), 0 if set(states) <= {"COMPLETED"} else 1

    code = shell.watch(run.name, check, poll)
    shell.run(status(run), run.folder)
    return code


def _log_folder(workdir: str) -> str:
    return f"{workdir.rstrip('/')}/logs"


def _nodes_and_gpus(request: Request) -> tuple[int, int]:
    """Nodes, and GPUs per node."""
    if request.slice is None:
        return request.site.nodes, request.site.gpus_per_node
    return request.slice.hosts, request.slice.chips_per_host


def _options(request: Request, logs: str) -> list[str]:
    """Arguments of `sbatch`; unlike lines of the script, no shell parses them."""
    site = request.site
    nodes, gpus = _nodes_and_gpus(request)
    tasks = 1 if site.processes_per == "node" else gpus
    name = "%x-%A_%a.out" if request.sweep else "%x-%j.out"
    return [
        f"--job-name={request.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={gpus}",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        f"--signal=TERM@{_GRACE}",
        f"--output={logs.replace('%', '%%')}/{name}",
        *([f"--array=0-{len(request.sweep) - 1}"] if request.sweep else []),
        *(f"--{key}={getattr(site, key)}" for key in ("partition", "account", "time") if getattr(site, key)),
        # Passes on the submitting environment, which has the secrets; they are written nowhere.
        "--export=ALL",
    ]


def _node_options(request: ArrayRequest) -> list[str]:
    _, gpus = _nodes_and_gpus(request)
    return ["--nodes=1", "--ntasks-per-node=1", f"--gpus-per-node={gpus}", "--exclusive"]


def _common_options(request: ArrayRequest, logs: str) -> list[str]:
    site = request.site
    return [
        f"--job-name={request.name}",
        "--requeue",
        "--open-mode=append",
        f"--output={logs.replace('%', '%%')}/%x-%j.out",
        *(f"--{key}={getattr(site, key)}" for key in ("partition", "account", "time") if getattr(site, key)),
        "--export=ALL",  # as in `_options`
    ]


def _array_script(request: ArrayRequest, task: str) -> str:
    return shell.render_script(
        "slurm_array.sh",
        name=request.name,
        task=task,
        exports=shell.export_lines(request.environment),
        secrets=_secret_lines(request),
        setup=request.site.setup,
        folder=shlex.quote(f"{request.launch_folder}/{request.commit}"),
        command=shlex.join(request.command),
        index=request.index_argument("$SLURM_ARRAY_TASK_ID").replace("=", '="', 1) + '"',
        max_restarts=str(request.max_restarts),
    )


def _finish_script(request: EncodeRequest) -> str:
    return shell.render_script(
        "slurm_finish.sh",
        name=request.name,
        exports=shell.export_lines(request.environment),
        setup=request.site.setup,
        folder=shlex.quote(f"{request.launch_folder}/{request.commit}"),
        store=shlex.quote(request.store),
    )


def _secret_lines(request: Request) -> str:
    secrets = request.secrets.items()
    missing = [f': "${{{source}:?the secret {name} is not in the environment}}"' for name, source in secrets]
    renamed = [f'export {name}="${{{source}}}"' for name, source in secrets if name != source]
    return "\n".join([*missing, *renamed])


def _script(request: Request) -> str:
    environment = dict(request.environment)
    if request.site.processes_per == "node":  # JAX uses one GPU per process under Slurm by default
        _, gpus = _nodes_and_gpus(request)
        environment = {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(gpus))), **environment}
    return shell.render_script(
        "slurm_job.sh",
        name=request.name,
        exports=shell.export_lines(environment),
        secrets=_secret_lines(request),
        setup=request.site.setup,
        folder=shlex.quote(f"{request.launch_folder}/{request.commit}"),
        job="\n".join(_jobs(request)),
        grace=str(_GRACE),
        max_restarts=str(request.max_restarts),
    )


def _jobs(request: Request) -> list[str]:
    """Lines that set `workdir`, and `job`, the arguments of `python`."""
    if not request.sweep:
        return [f"workdir={shlex.quote(request.workdir)} job=({shlex.join(request.command)})"]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, arguments in enumerate(request.sweep):
        names = "+".join(text.removeprefix("--config.").replace("/", "_") for text in arguments)
        workdir = f"{request.workdir.rstrip('/')}/{names}"
        job = ("-m", "lvm.train", *request.train_arguments, *arguments, f"--workdir={workdir}")
        lines.append(f"  {index}) workdir={shlex.quote(workdir)} job=({shlex.join(job)}) ;;")
    return [*lines, "esac"]
