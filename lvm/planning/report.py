"""A plan as lines to read."""

from __future__ import annotations

from lvm.hardware.sharding import AXES
from lvm.planning.collectives import BETWEEN_SLICES, PADDING
from lvm.planning.plan import Plan

_GIB, _GB, _TERA = 2**30, 10**9, 10**12
_LIMITS = {
    "flops": "peak bfloat16, what is computed again counted",
    "hbm": "bandwidth of memory",
    "ici": "links between chips, all of them busy",
    "network": "network between slices",
}


def lines(plan: Plan) -> list[str]:
    """The whole plan."""
    return [*_heading(plan), "", *_memory(plan), "", *_roofline(plan), "", *_sent(plan), *_ending(plan)]


def _heading(plan: Plan) -> list[str]:
    config, model = plan.config, plan.config.model
    mesh = " × ".join(
        f"{axis} {getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1
    )
    rows = f"{config.batch_size} rows of {model.context} tokens"
    parts = config.objective.accumulate_steps
    return [
        f"{plan.target.name}: {plan.target.chips} chips, mesh {mesh or 'of one'}",
        f"{plan.parameters:,} parameters, {rows}{f' in {parts} parts' if parts > 1 else ''}, remat {model.remat}",
        *plan.notes,
    ]


def _memory(plan: Plan) -> list[str]:
    parts = {
        "parameters": plan.params_bytes,
        "optimizer": plan.optimizer_bytes,
        "temporaries": plan.temp_bytes,
        "total, with a batch": plan.total_bytes,
    }
    limit = f"{plan.target.usable_bytes / _GIB:.2f} of {plan.target.hbm_bytes / _GIB:.2f} GiB may be used"
    return [
        f"{'memory a chip':<22} {'GiB':>8}",
        *(f"  {name:<20} {size / _GIB:>8.2f}" for name, size in parts.items()),
        f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {limit}",
    ]


def _roofline(plan: Plan) -> list[str]:
    slowest = max(plan.seconds, key=lambda name: plan.seconds[name])
    peak = plan.target.described.accelerator.peak_flops * plan.target.chips
    bound = plan.flops_per_step / peak / plan.least_seconds
    return [
        f"{'a step takes at least':<22} {'seconds':>8}   by",
        *(f"  {name:<20} {value:>8.4f}   {_LIMITS[name]}" for name, value in plan.seconds.items()),
        f"  {plan.flops_per_step / _TERA:,.1f} TFLOP a step; MFU (causal) is {bound:.1%} at most, limited by {slowest}",
    ]


def _sent(plan: Plan) -> list[str]:
    if plan.target.chips == 1:
        return ["one chip sends nothing"]
    table = [f"{'received a chip':<22} {'GB':>8} {'theory':>8} {'count':>7} {'overlapped':>11}"]
    sent = {collective.kind: collective for collective in plan.sent}
    for kind in [*sent, *(kind for kind in plan.theory if kind not in sent)]:
        found = sent.get(kind)
        size, count = (found.bytes, found.count) if found else (0.0, 0)
        theory = "" if kind == PADDING else f"{plan.theory.get(kind, 0) / _GB:.3f}"
        beside = f"{found.overlapped / found.bytes:.0%}" if found and found.bytes and found.count else ""
        table.append(f"  {kind:<20} {size / _GB:>8.3f} {theory:>8} {count or '':>7} {beside:>11}")
    ratio = of_theory(plan)
    if ratio is not None and plan.compile_seconds is not None:
        table.append(f"  without padding {ratio:.3f} times what fully sharded training should send")
    return table


def of_theory(plan: Plan) -> float | None:
    """Bytes received without padding by what theory has; None where theory has nothing."""
    found = sum(c.bytes for c in plan.sent if c.kind not in (PADDING, BETWEEN_SLICES))
    wanted = sum(size for kind, size in plan.theory.items() if kind != BETWEEN_SLICES)
    return found / wanted if wanted else None


def _ending(plan: Plan) -> list[str]:
    return [] if plan.compile_seconds is None else ["", f"compiled in {plan.compile_seconds:.0f} s"]
