"""Submits a run, and looks after it: on this machine, TPU VMs, GKE or Slurm.

    python -m lvm.submit --on=local --processes=2 --config=FILE --workdir=DIR
    python -m lvm.submit --on=tpu-vm --accelerator=v5litepod-256 --run=NAME --config=FILE --workdir=gs://…
    python -m lvm.submit {watch,logs,status,cancel,list} --on=… --run=NAME

Everything that begins with `--config` goes to `lvm.train` as it is. `--dry_run` writes every file and prints every
command, and runs none of them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from absl import flags

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.hardware.accelerators import resolve
from lvm.launch import backends
from lvm.launch.request import CAPACITIES, ClusterConfig, Request, check_run, pairs, read_site, sweep_of

VERBS = ("watch", "logs", "status", "cancel", "list")

_ON = flags.DEFINE_enum("on", backends.LOCAL, backends.NAMES, "where the run goes")
_RUN = flags.DEFINE_string(
    "run", "", "its name, the same at every restart; on this machine the workdir's by default"
)
_WORKDIR = flags.DEFINE_string("workdir", "", "where the run lives")
_ACCELERATOR = flags.DEFINE_string("accelerator", "", "v5litepod-256, v5e:16x16, v5p-128, h100-64 …")
_SLICES = flags.DEFINE_integer("slices", 1, "slices of such accelerators", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "processes of a run on this machine", lower_bound=1)
_GRACE = flags.DEFINE_float(
    "grace", 60.0, "seconds for the rest to end after one process failed, on this machine", lower_bound=0.0
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "times that a failed run is started again", lower_bound=0
)
_SPOT = flags.DEFINE_bool("spot", False, "capacity that may be taken away")
_RESERVED = flags.DEFINE_bool("reserved", False, "capacity that is reserved for you")
_QUEUED = flags.DEFINE_bool("queued", False, "wait in the queue for up to a week")
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE: an environment variable of the run")
_SECRET = flags.DEFINE_multi_string(
    "secret", [], "NAME or NAME=WHERE: a variable whose value is kept elsewhere"
)
_SWEEP = flags.DEFINE_multi_string("sweep", [], "KEY=VALUE,VALUE: a run for each, as an array of Slurm")
_SITE = flags.DEFINE_string("site", None, "a YAML file of --project, --zone … --setup")
_COMMIT = flags.DEFINE_string("commit", "", "the code to run; by default what is checked out")
_SHIP_CHANGES = flags.DEFINE_bool(
    "ship_changes", False, "ship changes that aren't committed, and record them"
)
_PLAN = flags.DEFINE_bool("plan", True, "refuse what `lvm.plan` says doesn't fit")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "write the files, print the commands, run none")
_OUT = flags.DEFINE_string("out", "", "folder for the run's files; runs/submitted/RUN by default")
_POLL = flags.DEFINE_float("poll", 60.0, "seconds between two looks of watch", lower_bound=0.01)
# Keys of a site, each a flag of the same name.
for _name, _help in (
    ("project", "of Google Cloud"),
    ("zone", "of Google Cloud"),
    ("cluster", "of GKE"),
    ("namespace", "of GKE"),
    ("image", "the container on GKE"),
    ("queue", "of Kueue"),
    ("runtime_version", "of TPU VMs"),
    ("service_account", "that hosts or pods run as"),
    ("partition", "of Slurm"),
    ("account", "of Slurm"),
    ("time", "limit of Slurm, such as 2-00:00:00"),
    ("processes_per", "node or gpu, under Slurm"),
    ("setup", "a line of shell that Slurm's jobs run first"),
):
    flags.DEFINE_string(_name, None, _help)
flags.DEFINE_integer("nodes", None, "of a run on GPUs under Slurm")
flags.DEFINE_integer("gpus_per_node", None, "under Slurm")
SITE_KEYS = tuple(field.name for field in dataclasses.fields(ClusterConfig))
# What a run is submitted with, and looking after one would ignore.
_SUBMITTING = (
    _ACCELERATOR, _SLICES, _PROCESSES, _GRACE, _MAX_RESTARTS, _SPOT, _RESERVED, _QUEUED, _ENV, _SECRET, _SWEEP,
    _COMMIT, _SHIP_CHANGES, _PLAN, _DRY_RUN,
)  # fmt: skip


def main(verb: str, job: tuple[str, ...]) -> int:
    """The command; returns the exit code."""
    on, site = _ON.value, _site()
    _refuse(f"--on={on}", *(flags.FLAGS[name] for name in SITE_KEYS if name not in backends.SITE_KEYS[on]))
    run = _run(verb)
    folder = Path(_OUT.value or (f"runs/submitted/{run}" if run else "runs/submitted"))
    if verb:
        if job:
            raise UserError(f"{job[0]}: {verb} takes no configuration")
        _refuse(verb, *_SUBMITTING)
        return backends.manage(verb, on, backends.find(on, run, site, folder, _WORKDIR.value), _POLL.value)
    if not any(argument.partition("=")[0] == "--config" for argument in job):
        raise UserError("--config: not given; it names the experiment's file")
    if not _WORKDIR.value:
        raise UserError("--workdir: not given; it is where the run lives")
    request = Request(
        run=run,
        workdir=_WORKDIR.value,
        job=job,
        slice=resolve(_ACCELERATOR.value) if _ACCELERATOR.value else None,
        slices=_SLICES.value,
        capacity=_capacity(),
        environment=pairs("env", _ENV.value),
        secrets=pairs("secret", _SECRET.value, whole=True),
        max_restarts=_MAX_RESTARTS.value,
        sweep=sweep_of(_SWEEP.value),
        site=site,
    )
    if on == backends.LOCAL:
        _refuse(
            f"--on={on}",
            _ACCELERATOR,
            _SLICES,
            _SPOT,
            _RESERVED,
            _QUEUED,
            _SWEEP,
            _COMMIT,
            _SHIP_CHANGES,
            _SITE,
        )
        return backends.run_here(request, folder, _PROCESSES.value, _GRACE.value, _DRY_RUN.value)
    _refuse(f"--on={on}", _PROCESSES, _GRACE, *([] if on == "slurm" else [_SWEEP]))
    if request.slice is not None:
        _refuse(f"--accelerator={_ACCELERATOR.value}", flags.FLAGS["nodes"], flags.FLAGS["gpus_per_node"])
    options = backends.SubmitOptions(_COMMIT.value, _SHIP_CHANGES.value, _PLAN.value, _DRY_RUN.value)
    backends.submit(on, request, folder, options)
    return 0


def _run(verb: str) -> str:
    """The run's name."""
    if verb == "list":
        return ""
    if not _RUN.value and _ON.value == backends.LOCAL and _WORKDIR.value:
        name = re.sub(r"[^a-z0-9]+", "-", f"run-{Path(_WORKDIR.value).resolve().name.lower()}")
        return name[:40].strip("-")
    if not _RUN.value:
        raise UserError("--run: not given; it is the run's name")
    check_run(_RUN.value)
    return _RUN.value


def _capacity() -> str:
    chosen = [flag.name for flag in (_SPOT, _RESERVED, _QUEUED) if flag.value]
    if len(chosen) > 1:
        raise UserError(f"{', '.join(f'--{name}' for name in chosen)}: choose one")
    return chosen[0] if chosen else CAPACITIES[0]


def _site() -> ClusterConfig:
    given = {name: flags.FLAGS[name].value for name in SITE_KEYS}
    return read_site(_SITE.value, {name: value for name, value in given.items() if value is not None})


def _refuse(beside: str, *given: flags.FlagHolder | flags.Flag) -> None:
    """What would be ignored `beside` something else is an error."""
    for flag in given:
        if flag.present:
            raise UserError(f"--{flag.name}: means nothing with {beside}")


if __name__ == "__main__":
    JOB = tuple(argument for argument in sys.argv[1:] if argument.startswith("--config"))
    sys.argv = [argument for argument in sys.argv if argument not in JOB]
    VERB = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in VERBS else ""
    cli.run(lambda: sys.exit(main(VERB, JOB)))
