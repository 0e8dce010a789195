"""Text report of a plan."""

from lvm.hardware.accelerators import GIB, GIGA, TERA
from lvm.planning.collectives import PADDING, Collective
from lvm.planning.estimate import count_parameters
from lvm.planning.meshes import format_mesh
from lvm.planning.plan import Plan

_LIMITS = {
    "flops": "peak bfloat16, recomputation included",
    "hbm": "HBM bandwidth",
    "ici": "links between chips, all of them busy",
    "network": "network between slices",
}


def format_plan(plan: Plan) -> list[str]:
    """Lines of the report."""
    target, config, steps = plan.target, plan.config, plan.config.objective.accumulate_steps
    rows = f"{config.batch_size} rows of {config.model.context} tokens{f' in {steps} micro-batches' * (steps > 1)}"
    sizes = {
        "parameters": plan.params_bytes,
        "optimizer": plan.optimizer_bytes,
        "temporaries": plan.temp_bytes,
        "total, with a batch": plan.total_bytes,
    }
    usable, memory = target.usable_bytes / GIB, target.hbm_bytes / GIB
    lines = [
        f"{target.name}: {target.chips} chips, mesh {format_mesh(config.mesh)}",
        f"{count_parameters(config.model):,} parameters, {rows}, remat {config.model.remat}",
        *plan.notes,
        "",
        f"{'memory per chip':<22} {'GiB':>8}",
        *(f"  {name:<20} {size / GIB:>8.2f}" for name, size in sizes.items()),
        f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {usable:.2f} of {memory:.2f} GiB usable",
    ]
    lines += ["", *_roofline(plan), "", *_collectives(plan)]
    return lines if plan.compile_seconds is None else [*lines, "", f"compiled in {plan.compile_seconds:.0f} s"]


def _roofline(plan: Plan) -> list[str]:
    seconds = plan.roofline_seconds
    peak = plan.target.slice.accelerator.peak_flops * plan.target.chips
    mfu = plan.flops_per_step / peak / plan.min_step_seconds
    return [
        f"{'minimum step time':<22} {'seconds':>8}   limit",
        *(f"  {name:<20} {value:>8.4f}   {_LIMITS[name]}" for name, value in seconds.items()),
        f"  {plan.flops_per_step / TERA:,.1f} TFLOP per step; MFU (causal) is at most {mfu:.1%}, limited by "
        f"{max(seconds, key=seconds.__getitem__)}",
    ]


def _collectives(plan: Plan) -> list[str]:
    if plan.target.chips == 1:
        return ["no communication on one chip"]
    table = [f"{'received per chip':<22} {'GB':>8} {'ideal':>8} {'count':>7} {'overlapped':>11}"]
    received = {collective.kind: collective for collective in plan.collectives}
    for kind in dict.fromkeys([*received, *plan.ideal_bytes]):
        sent = received.get(kind, Collective(kind, 0.0, 0))
        ideal = "" if kind == PADDING else f"{plan.ideal_bytes.get(kind, 0) / GIGA:.3f}"
        overlapped = f"{sent.overlapped_bytes / sent.bytes:.0%}" if sent.bytes and sent.count else ""
        table.append(f"  {kind:<20} {sent.bytes / GIGA:>8.3f} {ideal:>8} {sent.count or '':>7} {overlapped:>11}")
    if plan.ideal_ratio is not None and plan.compile_seconds is not None:
        table.append(f"  {plan.ideal_ratio:.3f} times ideal fully sharded training, without padding")
    return table
