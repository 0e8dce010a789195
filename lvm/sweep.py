"""Scaling laws: plan a sweep of runs, run it, watch it, fit it; check a model's parametrization.

    lvm sweep plan --config=configs/sweep_demo.py --out=DIR [--dry_run]
    lvm sweep run --sweep=DIR [--index=i]
    lvm sweep status --sweep=DIR [--watch=10]
    lvm sweep fit --sweep=DIR --out=DIR
    lvm sweep fit --csv=FILE --drop_highest=5 --max_flops=1e21 --method=variable_projection --out=DIR
    lvm sweep coordinate-check --config=configs/demo_lvm.py --out=DIR

`plan` prints a table with the price and writes sweep.json; `run` trains what isn't done, beside other runners of the
same sweep, and adds each result to results.csv. `fit` fits a law to the results, or to a table, and writes fit.json and
index.html (docs/scaling.md). `coordinate-check` trains models of several widths for a few steps, and plots the sizes of
their activations.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence

from etils import epath

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.scaling import coordinate_check, report
from lvm.scaling.analysis import Settings, analyze
from lvm.scaling.config import SweepConfig
from lvm.scaling.manifest import MANIFEST
from lvm.scaling.observations import Observations, read_csv
from lvm.scaling.parametric import METHODS, FitSettings
from lvm.scaling.plan import extend_sweep, plan_sweep
from lvm.scaling.runner import run_sweep
from lvm.scaling.runs import POINTS, read_runs
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


def _fit(args: cli.Args) -> None:
    if bool(args.csv) == bool(args.sweep):
        raise UserError("--csv or --sweep: give one of them, a table of runs or the folder of a sweep")
    fit = FitSettings(
        method=args.method,
        delta=args.delta,
        overestimate_penalty=args.overestimate_penalty,
        underestimate_penalty=args.underestimate_penalty,
        pins={name: _to_number("pin", name, value) for name, value in _pairs("pin", args.pin).items()},
        inits=args.inits,
    )
    settings = Settings(
        fit=fit,
        drop_highest=args.drop_highest,
        min_flops=args.min_flops,
        max_flops=args.max_flops,
        max_residual=args.max_residual,
        bootstrap=args.bootstrap,
        seed=args.seed,
        budgets=tuple(_to_number("budgets", "", value) for value in args.budgets),
    )
    _check_used(args)
    rows, warnings = _read(args, args.csv or args.sweep)
    baseline = None
    if args.baseline:
        baseline, more = _read(args, args.baseline)
        warnings = [*warnings, *(f"baseline: {warning}" for warning in more)]
    analysis = analyze(rows, settings, baseline, warnings)
    for warning in analysis.warnings:
        log_warning(warning)
    report.write_results(args.out, analysis, epath.Path(args.csv or args.sweep).name)
    for name, value, meaning in report.summary_table(analysis):
        print(f"{name:<40} {value:>22}  {meaning}")
    log_info(f"wrote {epath.Path(args.out) / report.PAGE} and {report.FIT} beside it")


def _read(args: cli.Args, path: str) -> tuple[Observations, list[str]]:
    """Rows of a table or of a sweep's folder, and warnings of reading them."""
    if _is_sweep(args, path):
        return read_runs(path, args.points, args.count_embedding)
    return read_csv(path, _pairs("columns", args.columns)), []


def _is_sweep(args: cli.Args, path: str) -> bool:
    return path == args.sweep or epath.Path(path).is_dir()


def _check_used(args: cli.Args) -> None:
    """Raises UserError for a flag without effect on what is read or fitted."""
    are_sweeps = [_is_sweep(args, path) for path in (args.csv or args.sweep, args.baseline) if path]
    for name in ("points", "count_embedding"):
        if args[name].present and not any(are_sweeps):
            raise UserError(f"--{name}: has no effect on a table, {args.csv}")
    if args.columns and all(are_sweeps):
        raise UserError(f"--columns: has no effect on a sweep, {args.sweep}")
    if args["delta"].present and args.method == "variable_projection":
        raise UserError("--delta: has no effect on squared residuals; use huber or variable_projection_huber")


def _pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` items by name."""
    pairs = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not (name and separator and value) or name in pairs:
            raise UserError(f"--{flag}={item}: expected NAME=VALUE, each name once")
        pairs[name] = value
    return pairs


def _to_number(flag: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--{flag}={name and f'{name}='}{text}: expected a number") from error


def _main_fit(argv: Sequence[str]) -> int:
    flags = cli.Flags(__doc__)
    flags.string("csv", "", "table of finished runs, one a row, with a header")
    flags.string("sweep", "", "folder of a sweep, with sweep.json")
    flags.string("out", None, "folder for fit.json and index.html", required=True)
    flags.comma_list("columns", (), "FIELD=NAME,…: columns of params, tokens, flops and loss with names of their own")
    flags.enum("points", "final", POINTS, "of a sweep: last held-out losses, or all of the training curves")
    flags.boolean("count_embedding", True, "of a sweep: N includes embedding and output projection")
    flags.enum("method", "huber", METHODS, "law and objective")
    flags.float("delta", 1e-3, "where the Huber loss becomes linear")
    flags.float("overestimate_penalty", 1.0, "weight of rows whose loss is predicted too high")
    flags.float("underestimate_penalty", 1.0, "weight of rows whose loss is predicted too low")
    flags.comma_list("pin", (), "NAME=VALUE,…: parameters that are known, such as E=1.8")
    flags.integer("inits", 0, "starts, spread over the grid; 0: all of it", lower_bound=0)
    flags.integer("drop_highest", 0, "leave out so many rows with the highest losses", lower_bound=0)
    flags.float("min_flops", 0.0, "leave out rows below")
    flags.float("max_flops", math.inf, "leave out rows of so many FLOPs or more")
    flags.float(
        "max_residual", 0.0, "leave out rows beyond so many robust deviations of a first fit; 0: none", lower_bound=0
    )
    flags.integer("bootstrap", 200, "resamples for intervals; 0: none", lower_bound=0)
    flags.integer("seed", 0, "seed of the resamples")
    flags.comma_list("budgets", (), "FLOPs to predict for; default: the largest, 10 and 100 times it")
    flags.string("baseline", "", "table or sweep of another recipe, for the effective speedup over it")
    return flags.run(_fit, argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": _main_plan,
    "run": _main_run,
    "status": _main_status,
    "fit": _main_fit,
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
