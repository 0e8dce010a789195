"""Submit a training run or an encoding and manage it: locally, on TPU VMs, GKE or Slurm.

    lvm submit --on=local --processes=2 --config=FILE --workdir=DIR
    lvm submit --on=tpu-vm --accelerator=v5litepod-256 --run=NAME --config=FILE --workdir=gs://…
    lvm submit encode --on=slurm --workers=500 --run=NAME --tokenizer=DIR --source=SOURCE --out=STORE
    lvm submit encode --on=local --run=NAME --tokenizer=DIR --source=SOURCE --out=STORE
    lvm submit sweep --on=slurm --run=NAME --accelerator=h100-8 --sweep=DIR
    lvm submit {watch,logs,status,cancel,list} --on=… --run=NAME

Arguments that begin with `--config` are passed on to `lvm train`. `--dry_run` writes every file and prints every
command without running any.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lvm.common import cli, progress
from lvm.common.errors import UserError
from lvm.common.files import is_remote
from lvm.data.store.status import count_complete, describe_progress
from lvm.hardware.accelerators import resolve
from lvm.launch import backends, requests
from lvm.launch.requests import ClusterConfig
from lvm.scaling.manifest import read_sweep
from lvm.scaling.status import sweep_status
from tokenizer import encode

VERBS = ("watch", "logs", "status", "cancel", "list")

_LOCAL, _REMOTE = (backends.LOCAL,), tuple(name for name in backends.NAMES if name != backends.LOCAL)
# Flags of a submission → backends that use them. Other verbs use none of them.
_SUBMISSION_FLAGS = {
    **dict.fromkeys(("max_restarts", "env", "secret", "plan", "dry_run"), backends.NAMES),
    **dict.fromkeys(("accelerator", "slices", "spot", "reserved", "queued", "commit", "ship_changes"), _REMOTE),
    **dict.fromkeys(("processes", "grace"), _LOCAL),
    "sweep": ("slurm",),
}
# The same for an encoding.
_ENCODE_FLAGS = {
    **dict.fromkeys(("accelerator", "spot", "reserved", "queued", "commit", "ship_changes", "check"), _REMOTE),
    **dict.fromkeys(("workers", "parallelism"), backends.SCHEDULERS),
    **dict.fromkeys(("processes", "grace"), _LOCAL),
    "slices": ("tpu-vm",),
    "site": _REMOTE,
}
_CLUSTER_KEYS = [field.name for field in dataclasses.fields(ClusterConfig)]


def _run(args: cli.Args, verb: str, train_arguments: tuple[str, ...]) -> int:
    backend = f"--on={args.on}"
    used = ClusterConfig.keys_of(args.on)
    _reject_flags(args, backend, [name for name in _CLUSTER_KEYS if name not in used])
    settings = {name: args[name].value for name in _CLUSTER_KEYS if args[name].value is not None}
    site = requests.read_cluster_config(args.site, settings)
    name = _run_name(args, verb)
    folder = Path(args.out or (f"runs/submitted/{name}" if name else "runs/submitted"))
    if verb:
        if train_arguments:
            raise UserError(f"{train_arguments[0]}: {verb} takes no configuration")
        _reject_flags(args, verb, _SUBMISSION_FLAGS)
        submitted = backends.load_submitted(args.on, name, site, folder, args.workdir)
        code = backends.manage(verb, args.on, submitted, args.poll)
        if verb == "status" and submitted.store:
            print("\n".join(describe_progress(submitted.store)))
        if verb == "status" and submitted.sweep:
            print("\n".join(sweep_status(submitted.sweep)[0]))
        return code
    if not any(argument.partition("=")[0] == "--config" for argument in train_arguments):
        raise UserError("--config: required, the config file of the run")
    if not args.workdir:
        raise UserError("--workdir: required, the directory of the run")
    request = requests.Request(
        name=name,
        workdir=args.workdir,
        site=site,
        train_arguments=train_arguments,
        commit=args.commit,
        slice=resolve(args.accelerator) if args.accelerator else None,
        slices=args.slices,
        capacity=_capacity(args),
        environment=requests.parse_pairs("env", args.env),
        secrets=requests.parse_pairs("secret", args.secret, default_to_name=True),
        max_restarts=args.max_restarts,
        sweep=requests.parse_sweep(args.sweep),
    )
    _reject_flags(args, backend, [flag for flag, users in _SUBMISSION_FLAGS.items() if args.on not in users])
    if args.on == backends.LOCAL:
        _reject_flags(args, backend, ["site"])
        newest_step = functools.partial(progress.read, args.workdir)
        return backends.run_local(request, folder, args.processes, args.grace, newest_step, args.dry_run)
    if request.slice is not None:
        _reject_flags(args, f"--accelerator={args.accelerator}", ["nodes", "gpus_per_node"])
    backends.submit(args.on, request, folder, args.ship_changes, args.plan, args.dry_run)
    return 0


def _run_encode(args: cli.Args, names: Sequence[str]) -> int:
    """Submits an encoding; `names` are the flags that are passed on to `tokenizer.encode`."""
    backend, used = f"--on={args.on}", ClusterConfig.keys_of(args.on)
    _reject_flags(args, backend, [name for name in _CLUSTER_KEYS if name not in used])
    _reject_flags(args, backend, [flag for flag, users in _ENCODE_FLAGS.items() if args.on not in users])
    if not args.source or not args.run:
        raise UserError(f"--{'run' if args.source else 'source'}: required")
    if args.num_shards < args.workers:
        raise UserError(f"--num_shards={args.num_shards}: less than --workers={args.workers}; use a multiple of it")
    for name in ("tokenizer", "source", "out"):
        path = args[name].value
        is_shared = path and (
            path.startswith("gs://") or path.endswith(".py") or (name == "source" and is_remote(path))
        )
        if args.on in ("gke", "tpu-vm") and path and not is_shared:
            raise UserError(f"--{name}={path}: hosts share no disk; use gs://…")
    settings = {name: args[name].value for name in _CLUSTER_KEYS if args[name].value is not None}
    request = requests.EncodeRequest(
        name=args.run,
        workdir=f"{args.out.rstrip('/')}.encode",
        site=requests.read_cluster_config(args.site, settings),
        commit=args.commit,
        slice=resolve(args.accelerator) if args.accelerator else None,
        slices=args.slices,
        capacity=_capacity(args),
        environment=requests.parse_pairs("env", args.env),
        secrets=requests.parse_pairs("secret", args.secret, default_to_name=True),
        max_restarts=args.max_restarts,
        encode_arguments=tuple(f"--{name}={args[name].value}" for name in names if args[name].present),
        store=args.out,
        workers=args.workers,
        parallelism=min(args.parallelism or args.workers, args.workers),
    )
    folder = Path(args.folder or f"runs/submitted/{args.run}")
    if args.on == backends.LOCAL:
        shards = functools.partial(count_complete, args.out)
        return backends.run_local(request, folder, args.processes, args.grace, shards, args.dry_run)
    if args.check:
        encode.check(args)
    backends.submit(args.on, request, folder, args.ship_changes, plan=False, dry_run=args.dry_run)
    return 0


def _main_encode(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    encode.define_settings(flags)
    names = flags.names()
    flags.enum("on", backends.LOCAL, backends.NAMES, "backend")
    flags.integer("workers", 1, "groups of shards, each a task of the scheduler", lower_bound=1, upper_bound=100_000)
    flags.integer("parallelism", None, "workers at a time; default: all", lower_bound=1)
    flags.boolean("check", True, "submit only what `tokenizer encode` accepts, by opening tokenizer, source and store")
    flags.string("folder", "", "folder for the run's files; default: runs/submitted/RUN")
    _define_common(flags)
    return flags.run(lambda args: _run_encode(args, names), argv)


def _run_sweep(args: cli.Args) -> int:
    """Submits the tasks of a sweep to a scheduler."""
    used = ClusterConfig.keys_of(args.on)
    _reject_flags(args, f"--on={args.on}", [name for name in _CLUSTER_KEYS if name not in used])
    if not args.run:
        raise UserError("--run: required, the name of the run")
    if args.on == "gke" and not args.sweep.startswith("gs://"):
        raise UserError(f"--sweep={args.sweep}: hosts share no disk; use gs://…")
    tasks = len(read_sweep(args.sweep).tasks())
    settings = {name: args[name].value for name in _CLUSTER_KEYS if args[name].value is not None}
    request = requests.SweepRequest(
        name=args.run,
        workdir=args.sweep,
        site=requests.read_cluster_config(args.site, settings),
        commit=args.commit,
        slice=resolve(args.accelerator) if args.accelerator else None,
        capacity="spot" if args.spot else requests.CAPACITIES[0],
        environment=requests.parse_pairs("env", args.env),
        secrets=requests.parse_pairs("secret", args.secret, default_to_name=True),
        max_restarts=args.max_restarts,
        workers=tasks,
        parallelism=min(args.parallelism or tasks, tasks),
        folder=args.sweep,
    )
    folder = Path(args.folder or f"runs/submitted/{args.run}")
    backends.submit(args.on, request, folder, args.ship_changes, plan=False, dry_run=args.dry_run)
    return 0


def _main_sweep(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.enum("on", "slurm", backends.SCHEDULERS, "backend; elsewhere, run `lvm sweep run` itself on every host")
    flags.string("sweep", None, "folder of the sweep, which all hosts share", required=True)
    flags.integer("parallelism", None, "runs at a time; default: all", lower_bound=1)
    flags.string("folder", "", "folder for the run's files; default: runs/submitted/RUN")
    _define_common(flags)
    return flags.run(_run_sweep, argv)


def _run_name(args: cli.Args, verb: str) -> str:
    if verb == "list":
        return ""
    if not args.run and args.on == backends.LOCAL and args.workdir:
        name = re.sub(r"[^a-z0-9]+", "-", f"run-{Path(args.workdir).resolve().name.lower()}")
        return name[:40].strip("-")
    if not args.run:
        raise UserError("--run: required, the name of the run")
    requests.check_run_name(args.run)
    return args.run


def _capacity(args: cli.Args) -> str:
    chosen = [name for name in ("spot", "reserved", "queued") if args[name].value]
    if len(chosen) > 1:
        raise UserError(f"{', '.join(f'--{name}' for name in chosen)}: use one of them")
    return chosen[0] if chosen else requests.CAPACITIES[0]


def _reject_flags(args: cli.Args, context: str, names: Iterable[str]) -> None:
    """Raises UserError for a flag that `context` would ignore."""
    for name in names:
        if args[name].present:
            raise UserError(f"--{name}: has no effect with {context}")


def _define_common(flags: cli.Flags) -> None:
    flags.string("run", "", "name of the run, the same at every submission; default of training here: the workdir's")
    flags.string("accelerator", "", "slice or GPUs: v5litepod-256, v5e:16x16, v5p-128, h100-64")
    flags.integer("max_restarts", 3, "restart budget for failures; 0 never restarts", lower_bound=0)
    flags.integer("processes", 1, "number of processes on this machine", lower_bound=1)
    flags.float("grace", 60.0, "seconds from SIGTERM to SIGKILL, on this machine", lower_bound=0.0)
    flags.integer("slices", 1, "number of slices", lower_bound=1)
    flags.boolean("spot", False, "use preemptible capacity")
    flags.boolean("reserved", False, "use reserved capacity")
    flags.boolean("queued", False, "wait for capacity for up to a week")
    flags.multi_string("env", "NAME=VALUE: environment variable of the run")
    flags.multi_string("secret", "NAME or NAME=SECRET: environment variable that is read from a secret")
    flags.string("site", None, "YAML file of cluster settings, the flags --project to --setup")
    flags.string("commit", "", "revision of the code; default: HEAD")
    flags.boolean("ship_changes", False, "ship uncommitted changes too, and record them")
    flags.boolean("dry_run", False, "write the files and print the commands without running any")
    for field in dataclasses.fields(ClusterConfig):
        define = flags.integer if isinstance(field.default, int) else flags.string
        define(field.name, None, field.metadata["help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "encode":
        return _main_encode(argv[1:])
    if argv and argv[0] == "sweep":
        return _main_sweep(argv[1:])
    flags = cli.Flags(__doc__)
    flags.enum("on", backends.LOCAL, backends.NAMES, "backend")
    flags.string("workdir", "", "directory of the run")
    flags.multi_string("sweep", "KEY=VALUE,VALUE: one run per value, as a Slurm array job")
    flags.boolean("plan", True, "submit only what fits by `lvm plan`")
    flags.string("out", "", "folder for the run's files; default: runs/submitted/RUN")
    flags.float("poll", 60.0, "seconds between checks by watch", lower_bound=0.01)
    _define_common(flags)
    train_arguments = tuple(argument for argument in argv if argument.startswith("--config"))
    argv = [argument for argument in argv if argument not in train_arguments]
    verb = argv.pop(0) if argv and argv[0] in VERBS else ""
    return flags.run(lambda args: _run(args, verb, train_arguments), argv)


if __name__ == "__main__":
    cli.exit_process(main())
