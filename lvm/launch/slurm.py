"""Runs under Slurm: a batch script that starts one process a node or a GPU, and queues itself again when preempted."""

from __future__ import annotations

import shlex

from lvm.common import errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import shell
from lvm.launch.request import VARIABLE, Request, Submitted
from lvm.launch.shell import Command

SITE_KEYS = ("nodes", "gpus_per_node", "partition", "account", "time", "processes_per", "setup")
SCRIPT = "job.sh"
_GRACE = 300  # seconds before the end of its time that a job is told to save


def check(request: Request) -> None:
    """Raises UserError for what Slurm can't run."""
    if request.slice is not None and request.slice.accelerator.platform != "gpu":
        raise UserError(f"--accelerator: {request.slice.name}: wanted GPUs under Slurm, as in h100-64")
    if request.slices > 1:
        raise UserError("--slices: there are none under Slurm; give --nodes")
    if request.capacity != "on-demand":
        raise UserError(f"--{request.capacity}: under Slurm the --partition decides on that")
    for where in request.secrets.values():
        if not VARIABLE.fullmatch(where):
            raise UserError(
                f"--secret: {where!r} is no name of an environment variable, which is where secrets are under Slurm"
            )
    if "://" in request.workdir or not request.workdir.startswith("/"):
        raise UserError(f"--workdir: {request.workdir}: wanted a folder that all nodes see, from / on")


def files(request: Request) -> dict[str, str]:
    """The batch script; of a sweep, one of an array of which each task takes a run."""
    return {SCRIPT: _script(request)}


def submit(request: Request) -> list[Command]:
    """What creates the run, in the folder of its files."""
    code, logs = f"{request.folder}/{request.commit}", _logs(request.workdir)
    return [
        ["mkdir", "-p", code, logs],
        ["tar", "-xzf", f"{request.commit}.tar.gz", "-C", code],
        ["sbatch", "--parsable", *_options(request, logs), SCRIPT],
    ]


def status(run: Submitted) -> Command:
    columns = "--format=JobID%20,State%20,ExitCode,Elapsed,NNodes,Start,End"
    return [
        "sacct",
        "-X",
        f"--name={run.run}",
        "--starttime=now-30days",
        columns,
    ]  # by default, of today alone


def logs(run: Submitted) -> Command:
    """The last lines of every log of the run."""
    if not run.workdir:
        raise UserError("--workdir: not given; a run's logs are in it")
    pattern = f"{shlex.quote(_logs(run.workdir))}/{run.run}-*.out"
    return ["bash", "-c", f"tail -n 200 {pattern}"]


def cancel(run: Submitted) -> Command:
    return ["scancel", "--me", f"--name={run.run}"]


def listing(run: Submitted) -> Command:
    return ["squeue", "--me", "--format=%.20i %.40j %.10T %.12M %.6D %R"]


def watch(run: Submitted, poll: float) -> int:
    """Says what becomes of the run until none of its jobs is queued or running; Slurm itself starts it again.

    Returns:
      0 where all its jobs completed, 1 where one didn't.
    """
    queued = ["squeue", "--me", "--noheader", f"--name={run.run}", "--format=%T"]
    shown = ""

    def look() -> int | None:
        nonlocal shown
        states = shell.run(queued, run.folder, quiet=True)
        now = " ".join(states.split())
        if not now:
            shell.run(status(run), run.folder)
            ended = shell.run([*status(run)[:-1], "--noheader", "--format=State"], run.folder, quiet=True)
            return 0 if set(ended.split()) <= {"COMPLETED"} else 1
        if now != shown:
            log_info(f"{run.run}: {now}")
        shown = now
        return None

    return shell.watch(look, poll)


def _logs(workdir: str) -> str:
    return f"{workdir.rstrip('/')}/logs"


def _gpus(request: Request) -> tuple[int, int]:
    """Nodes, and GPUs of each."""
    if request.slice is None:
        return request.site.nodes, request.site.gpus_per_node
    return request.slice.hosts, request.slice.chips_per_host


def _options(request: Request, logs: str) -> list[str]:
    """Arguments of `sbatch`, not lines of the script: nothing in them is read by a shell."""
    site = request.site
    nodes, gpus = _gpus(request)
    tasks = 1 if site.processes_per == "node" else gpus
    name = "%x-%A_%a.out" if request.sweep else "%x-%j.out"
    return [
        f"--job-name={request.run}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={gpus}",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        f"--signal=TERM@{_GRACE}",
        f"--output={logs.replace('%', '%%')}/{name}",
        *([f"--array=0-{len(request.sweep) - 1}"] if request.sweep else []),
        *([f"--partition={site.partition}"] if site.partition else []),
        *([f"--account={site.account}"] if site.account else []),
        *([f"--time={site.time}"] if site.time else []),
        # Secrets are in the environment that submits: Slurm hands it on, and nobody writes them down.
        "--export=ALL",
    ]


def _script(request: Request) -> str:
    final = "|".join(str(code) for code in errors.FINAL)
    places = request.secrets.items()
    missing = [f': "${{{where}:?the secret {name} is not in the environment}}"' for name, where in places]
    renamed = [f'export {name}="${{{where}}}"' for name, where in places if name != where]
    lines = [
        "#!/bin/bash",
        f"# Run {request.run}: `sbatch` with the options beside this script starts it.",
        "set -uo pipefail",
        *shell.exports({**_devices(request), **request.environment}),
        *missing,
        *renamed,
        *([request.site.setup] if request.site.setup else []),
        f"cd {shlex.quote(f'{request.folder}/{request.commit}')} || exit 1",
        *_jobs(request),
        "# A preempted job is told to end here too; it waits for its processes, which are saving.",
        "trap ':' TERM",
        "# After the first process has ended, the others have time to end by themselves, with exit codes that say why.",
        f'srun --kill-on-bad-exit=0 --wait={_GRACE} python "${{job[@]}}" &',
        "step=$!",
        'wait "$step"',
        "code=$?",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        'echo "ended with exit code $code"',
        f'case "$code" in {final}) exit "$code" ;; esac',
        *(_requeue(request) if request.max_restarts else []),
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _requeue(request: Request) -> list[str]:
    """Starts the job again, unless it was cancelled or failed too often. To be preempted is no failure."""
    return [
        'failures="failures-$SLURM_JOB_ID"',
        f'if [ "$code" != {errors.EXIT_PREEMPTED} ]; then echo "$code" >>"$failures"; else touch "$failures"; fi',
        'state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)"',
        f'if [ "$(wc -l <"$failures")" -le {request.max_restarts} ] && [ "$state" = RUNNING ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]


def _devices(request: Request) -> dict[str, str]:
    """JAX takes one GPU a process under Slurm unless it is told otherwise."""
    _, gpus = _gpus(request)
    if request.site.processes_per == "gpu":
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(gpus)))}


def _jobs(request: Request) -> list[str]:
    """Lines that set `job`, the arguments after `python`."""
    if not request.sweep:
        return [f"job=({shlex.join(request.command)})"]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, arguments in enumerate(request.sweep):
        names = "+".join(text.removeprefix("--config.").replace("/", "_") for text in arguments)
        workdir = f"{request.workdir.rstrip('/')}/{names}"
        job = ("-m", "lvm.train", *request.job, *arguments, f"--workdir={workdir}")
        lines.append(f"  {number}) job=({shlex.join(job)}) ;;")
    return [*lines, "esac"]
