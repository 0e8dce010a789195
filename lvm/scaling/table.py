"""Tables of runs for a terminal."""

from collections.abc import Sequence

from lvm.scaling.manifest import Run, Sweep


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = [
        [
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (header, *rows)
    ]
    return ["  ".join(line).rstrip() for line in aligned]


def plan_table(sweep: Sweep) -> list[str]:
    """The runs of a plan, and the price of all in device-hours."""
    header = ("run", "N", "N no emb.", "D", "D/N", "FLOPs", "off", "rows", "lr", "warm-up", "steps", "epochs", "mesh",
              "micro", "device-h")  # fmt: skip
    lines = format_table(header, [_plan_row(run) for run in sweep.runs])
    own = sum(run.flops * (1 - run.trunk_step / run.steps) for run in sweep.runs)
    hours = sum(run.device_hours for run in sweep.runs)
    price = f"{hours:,.2f} device-hours" if hours else "no price: set config.accelerator or config.device_flops"
    return [*lines, f"{len(sweep.runs)} runs in {len(sweep.tasks())} tasks, {own:.3g} FLOPs, {price}"]


def _plan_row(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        f"{run.params:.4g}",
        f"{run.params_without_embedding:.4g}",
        f"{run.tokens:.4g}",
        f"{run.tokens / run.params:.3g}",
        f"{run.flops:.3g}",
        f"{run.flops / run.budget - 1:+.1%}" if run.budget else "",
        f"{run.batch_size}",
        f"{run.learning_rate:.3g}",
        f"{run.warmup_steps}",
        f"{run.steps}" + (f" from {run.trunk_step}" if run.trunk else ""),
        f"{run.epochs:.2g}",
        run.mesh,
        f"{run.micro_batches}",
        f"{run.device_hours:.3g}" if run.device_hours else "",
    )
