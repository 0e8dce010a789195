"""Submit a training run and manage it: locally, on TPU VMs, GKE or Slurm.

    lvm submit --on=local --processes=2 --config=FILE --workdir=DIR
    lvm submit --on=tpu-vm --accelerator=v5litepod-256 --run=NAME --config=FILE --workdir=gs://…
    lvm submit {watch,logs,status,cancel,list} --on=… --run=NAME

Arguments that begin with `--config` are passed on to `lvm train`. `--dry_run` writes every file and prints every
command without running any.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.hardware.accelerators import resolve
from lvm.launch import backends
from lvm.launch.request import CAPACITIES, ClusterConfig, Request, check_run, pairs, read_site, sweep_of

VERBS = ("watch", "logs", "status", "cancel", "list")

# Keys of a cluster config, each a flag of the same name.
_CLUSTER_FLAGS = {
    "project": "Google Cloud project",
    "zone": "Google Cloud zone",
    "cluster": "GKE cluster",
    "namespace": "GKE namespace",
    "image": "container image on GKE",
    "queue": "Kueue queue",
    "runtime_version": "TPU VM runtime version",
    "service_account": "service account of the hosts or pods",
    "partition": "Slurm partition",
    "account": "Slurm account",
    "time": "Slurm time limit, such as 2-00:00:00",
    "processes_per": "one process per node or per gpu, under Slurm",
    "setup": "shell line that Slurm jobs run first",
}
CLUSTER_KEYS = tuple(field.name for field in dataclasses.fields(ClusterConfig))
# Flags of a submission, which have no meaning for the other verbs.
_SUBMISSION_FLAGS = (
    "accelerator", "slices", "processes", "grace", "max_restarts", "spot", "reserved", "queued", "env", "secret",
    "sweep", "commit", "ship_changes", "plan", "dry_run",
)  # fmt: skip
_REMOTE_FLAGS = (
    "accelerator", "slices", "spot", "reserved", "queued", "sweep", "commit", "ship_changes", "site",
)  # fmt: skip


def _run(args: cli.Args, verb: str, job: tuple[str, ...]) -> int:
    cluster = _cluster(args)
    backend = f"--on={args.on}"
    _refuse(args, backend, *(name for name in CLUSTER_KEYS if name not in backends.SITE_KEYS[args.on]))
    run = _run_name(args, verb)
    folder = Path(args.out or (f"runs/submitted/{run}" if run else "runs/submitted"))
    if verb:
        if job:
            raise UserError(f"{job[0]}: {verb} takes no configuration")
        _refuse(args, verb, *_SUBMISSION_FLAGS)
        submitted = backends.find(args.on, run, cluster, folder, args.workdir)
        return backends.manage(verb, args.on, submitted, args.poll)
    if not any(argument.partition("=")[0] == "--config" for argument in job):
        raise UserError("--config: not given; it names the experiment's file")
    if not args.workdir:
        raise UserError("--workdir: not given; it is where the run lives")
    request = Request(
        run=run,
        workdir=args.workdir,
        job=job,
        slice=resolve(args.accelerator) if args.accelerator else None,
        slices=args.slices,
        capacity=_capacity(args),
        environment=pairs("env", args.env),
        secrets=pairs("secret", args.secret, whole=True),
        max_restarts=args.max_restarts,
        sweep=sweep_of(args.sweep),
        site=cluster,
    )
    if args.on == backends.LOCAL:
        _refuse(args, backend, *_REMOTE_FLAGS)
        return backends.run_here(request, folder, args.processes, args.grace, args.dry_run)
    _refuse(args, backend, "processes", "grace", *([] if args.on == "slurm" else ["sweep"]))
    if request.slice is not None:
        _refuse(args, f"--accelerator={args.accelerator}", "nodes", "gpus_per_node")
    options = backends.SubmitOptions(args.commit, args.ship_changes, args.plan, args.dry_run)
    backends.submit(args.on, request, folder, options)
    return 0


def _run_name(args: cli.Args, verb: str) -> str:
    if verb == "list":
        return ""
    if not args.run and args.on == backends.LOCAL and args.workdir:
        name = re.sub(r"[^a-z0-9]+", "-", f"run-{Path(args.workdir).resolve().name.lower()}")
        return name[:40].strip("-")
    if not args.run:
        raise UserError("--run: not given; it is the run's name")
    check_run(args.run)
    return args.run


def _capacity(args: cli.Args) -> str:
    chosen = [name for name in ("spot", "reserved", "queued") if args[name].value]
    if len(chosen) > 1:
        raise UserError(f"{', '.join(f'--{name}' for name in chosen)}: choose one")
    return chosen[0] if chosen else CAPACITIES[0]


def _cluster(args: cli.Args) -> ClusterConfig:
    given = {name: args[name].value for name in CLUSTER_KEYS}
    return read_site(args.site, {name: value for name, value in given.items() if value is not None})


def _refuse(args: cli.Args, context: str, *names: str) -> None:
    """Raises UserError for a given flag that `context` would ignore."""
    for name in names:
        if args[name].present:
            raise UserError(f"--{name}: means nothing with {context}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.enum("on", backends.LOCAL, backends.NAMES, "where the run goes")
    flags.string("run", "", "its name, the same at every restart; on this machine the workdir's by default")
    flags.string("workdir", "", "where the run lives")
    flags.string("accelerator", "", "v5litepod-256, v5e:16x16, v5p-128, h100-64 …")
    flags.integer("slices", 1, "slices of such accelerators", lower_bound=1)
    flags.integer("processes", 1, "processes of a run on this machine", lower_bound=1)
    flags.float(
        "grace",
        60.0,
        "seconds for the rest to end after one process failed, on this machine",
        lower_bound=0.0,
    )
    flags.integer("max_restarts", 3, "times that a failed run is started again", lower_bound=0)
    flags.boolean("spot", False, "capacity that may be taken away")
    flags.boolean("reserved", False, "capacity that is reserved for you")
    flags.boolean("queued", False, "wait in the queue for up to a week")
    flags.multi_string("env", "NAME=VALUE: an environment variable of the run")
    flags.multi_string("secret", "NAME or NAME=WHERE: a variable whose value is kept elsewhere")
    flags.multi_string("sweep", "KEY=VALUE,VALUE: a run for each, as an array of Slurm")
    flags.string("site", None, "a YAML file of --project, --zone … --setup")
    flags.string("commit", "", "the code to run; by default what is checked out")
    flags.boolean("ship_changes", False, "ship changes that aren't committed, and record them")
    flags.boolean("plan", True, "refuse what `lvm.plan` says doesn't fit")
    flags.boolean("dry_run", False, "write the files, print the commands, run none")
    flags.string("out", "", "folder for the run's files; runs/submitted/RUN by default")
    flags.float("poll", 60.0, "seconds between two looks of watch", lower_bound=0.01)
    flags.integer("nodes", None, "of a run on GPUs under Slurm")
    flags.integer("gpus_per_node", None, "under Slurm")
    for name, help in _CLUSTER_FLAGS.items():
        flags.string(name, None, help)
    argv = list(sys.argv[1:] if argv is None else argv)
    job = tuple(argument for argument in argv if argument.startswith("--config"))
    argv = [argument for argument in argv if argument not in job]
    verb = argv.pop(0) if argv and argv[0] in VERBS else ""
    return flags.run(lambda args: _run(args, verb, job), argv)


if __name__ == "__main__":
    cli.exit_process(main())
