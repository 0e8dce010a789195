"""Scaling laws: plan a sweep of runs, run it, watch it; check a model's parametrization.

    lvm sweep plan --config=configs/sweep_demo.py --out=DIR [--dry_run]
    lvm sweep run --sweep=DIR [--index=i]
    lvm sweep status --sweep=DIR [--watch=10]
    lvm sweep coordinate-check --config=configs/demo_lvm.py --out=DIR

`plan` prints a table with the price and writes sweep.json; `run` trains what isn't done, beside other runners of the
same sweep, and adds each result to results.csv (docs/scaling.md). `coordinate-check` trains models of several widths
for a few steps, and plots the sizes of their activations.
"""

import sys
import time
from collections.abc import Callable, Sequence

from etils import epath

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.scaling import coordinate_check
from lvm.scaling.config import SweepConfig
from lvm.scaling.manifest import MANIFEST
from lvm.scaling.plan import extend_sweep, plan_sweep
from lvm.scaling.runner import run_sweep
from lvm.scaling.status import sweep_status
from lvm.scaling.table import plan_table
from lvm.training.config import TrainConfig


def _plan(args: cli.Args) -> None:
    if not (args.out or args.dry_run):
        raise UserError("--out: required, the folder of the sweep; or --dry_run")
    sweep = plan_sweep(from_config_dict(SweepConfig, args.config))
    print("\n".join(plan_table(sweep)))
    for warning in sweep.warnings:
        log_warning(warning)
    if not args.dry_run:
        extend_sweep(args.out, sweep)
        log_info(f"wrote {epath.Path(args.out) / MANIFEST}")


def _main_plan(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", "", "folder of the sweep, new or to add runs to")
    flags.boolean("dry_run", False, "print the table and write nothing")
    return flags.run(_plan, argv)


def _main_run(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.string("sweep", None, "folder of the sweep", required=True)
    flags.integer("index", None, "only this task of a job array, from 0: a run and those that branch off it")
    flags.integer("max_restarts", 3, "restart budget of each run; 0 never restarts", lower_bound=0)
    flags.boolean("retry_failed", False, "run again what failed before")
    return flags.run(lambda args: run_sweep(args.sweep, args.index, args.max_restarts, args.retry_failed), argv)


def _status(args: cli.Args) -> None:
    while True:
        lines, is_settled = sweep_status(args.sweep)
        if sys.stdout.isatty() and args.watch:
            print("\x1b[2J\x1b[H", end="")  # clears the screen
        print("\n".join(lines))
        if not args.watch or is_settled:
            return
        time.sleep(args.watch)


def _main_status(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.string("sweep", None, "folder of the sweep", required=True)
    flags.float("watch", 0.0, "print again every so many seconds until all runs have ended; 0: once", lower_bound=0.0)
    return flags.run(_status, argv)


def _coordinate_check(args: cli.Args) -> None:
    if invalid := [width for width in args.widths if not width.isdecimal()]:
        raise UserError(f"--widths: {invalid[0]!r} is not a hidden size; expected integers, such as 64,128,256")
    widths = [int(width) for width in args.widths]
    check = coordinate_check.run(from_config_dict(TrainConfig, args.config), args.out, widths, args.steps)
    print(f"{'module':<10} {'initial size':>12} {'last size':>12} {'last change':>12}    exponents of the width")
    for name, *slopes in check.table():
        print(f"{name:<10} {' '.join(f'{slope:>+12.2f}' for slope in slopes)}")
    log_info(f"wrote {epath.Path(args.out) / coordinate_check.PLOT} and {coordinate_check.RESULTS} beside it")


def _main_coordinate_check(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", None, "folder for coordinates.json and coordinates.png", required=True)
    flags.comma_list("widths", ("64", "128", "256", "512"), "hidden sizes, in proportion to which the rest grows")
    flags.integer("steps", 4, "steps of training on one batch", lower_bound=1)
    return flags.run(_coordinate_check, argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": _main_plan,
    "run": _main_run,
    "status": _main_status,
    "coordinate-check": _main_coordinate_check,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in VERBS:
        return VERBS[argv[0]](argv[1:])

    def reject(args: cli.Args) -> None:
        raise UserError(f"lvm sweep: expected {', '.join(VERBS)}, got {argv[0] if argv else 'nothing'!r}")

    return cli.Flags(__doc__).run(reject, [argument for argument in argv if argument.startswith("-")])


if __name__ == "__main__":
    cli.exit_process(main())
