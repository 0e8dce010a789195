"""Search for mesh, batch size and rematerialization: pruned by the memory model, confirmed by compiling."""

import dataclasses
from collections.abc import Callable

from lvm.hardware import accelerators
from lvm.model.transformer import REMAT_POLICIES
from lvm.planning import meshes
from lvm.planning.estimate import MemoryModel
from lvm.planning.plan import Plan, Target, estimate_plan, make_plan, with_choice
from lvm.training.config import TrainConfig

MAX_COMPILES = 4  # that calibrate the memory model
_ROWS_PER_CHIP = (1, 2, 4, 8, 16)
_HEADROOM = 0.97  # of the usable memory, for proposals of the memory model
_TIE = 1.01  # step times within this factor rank equal


def search(config: TrainConfig, target: Target, memory: MemoryModel) -> list[Plan]:
    """Plans tried, the best that fits last; compiled if the target has devices. Empty if the model says none fits.

    Candidates are all valid meshes, 1 to 16 rows per chip, and every rematerialization policy. The best has the least
    roofline time per row; within 1 %, the lightest policy, then the largest batch. `config` is resolved, and its mesh
    gives `sequence` and `tensor`; `memory` is updated with each compile.
    """
    tried: list[Plan] = []
    while len(tried) <= MAX_COMPILES:  # the proposal calibrated by MAX_COMPILES is compiled too
        proposal = _propose(config, target, memory, tried)
        if proposal is None or any(plan.config == proposal.config for plan in tried):
            break
        if not target.devices:
            return [proposal]
        tried.append(make_plan(proposal.config, target, memory))
    fitting = [plan for plan in tried if plan.fits]
    if not fitting:
        return []
    best = min(fitting, key=_rank(fitting))
    return [*(plan for plan in tried if plan is not best), best]


def _propose(config: TrainConfig, target: Target, memory: MemoryModel, tried: list[Plan]) -> Plan | None:
    candidates = [
        estimate_plan(with_choice(config, remat, mesh, rows * mesh.data * mesh.fsdp, 1), target, memory)
        for mesh in meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices)
        for remat in REMAT_POLICIES
        for rows in _ROWS_PER_CHIP
    ]
    plans = [plan for plan in candidates if _may_fit(plan, tried)]
    return min(plans, key=_rank(plans)) if plans else None


def _may_fit(plan: Plan, tried: list[Plan]) -> bool:
    for other in tried:
        if other.config == plan.config:
            return other.fits
    return plan.total_bytes <= _HEADROOM * plan.target.usable_bytes


def _seconds_per_row(plan: Plan) -> float:
    return plan.min_step_seconds / plan.config.batch_size


def _rank(plans: list[Plan]) -> Callable[[Plan], tuple[float, int, int, int]]:
    fastest = min(_seconds_per_row(plan) for plan in plans)

    def key(plan: Plan) -> tuple[float, int, int, int]:
        slowdown = _seconds_per_row(plan) / fastest
        policy = list(REMAT_POLICIES).index(plan.config.model.remat)
        return 0.0 if slowdown < _TIE else slowdown, policy, -plan.config.batch_size, plan.config.mesh.fsdp

    return key


def nearest_fit(plan: Plan, memory: MemoryModel) -> str | None:
    """Configuration keys, or a larger slice, with which a plan that does not fit would; None if there are none.

    Tries a heavier rematerialization policy, then smaller micro-batches, then a larger `fsdp`, then a larger slice.
    Confirmed by compiling if the target has devices, except for a larger slice.
    """
    for choice in _lighter_choices(plan):
        proposal = estimate_plan(choice, plan.target, memory)
        if proposal.fits and plan.target.devices:
            proposal = make_plan(choice, plan.target, memory)
        if proposal.fits:
            return format_choice(choice, plan.config)
    return _larger_slice(plan, memory)


def _lighter_choices(plan: Plan) -> list[TrainConfig]:
    config, target = plan.config, plan.target
    policies, batch_size, steps = list(REMAT_POLICIES), config.batch_size, config.objective.accumulate_steps
    heavier = policies[policies.index(config.model.remat) + 1 :]
    choices = [with_choice(config, remat, config.mesh, batch_size, steps) for remat in heavier]
    valid = meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices, batch_size)
    for mesh in sorted(valid, key=lambda mesh: mesh.fsdp):
        if mesh.fsdp < config.mesh.fsdp:
            continue
        for count in (steps * 2**power for power in range(7)):
            if batch_size // (mesh.data * mesh.fsdp) % count == 0 and (mesh, count) != (config.mesh, steps):
                choices.append(with_choice(config, "full", mesh, batch_size, count))
    return choices


def _larger_slice(plan: Plan, memory: MemoryModel) -> str | None:
    """The smallest larger slice of the same chips, by the memory model alone."""
    slice_, config = plan.target.slice, plan.config
    for larger in accelerators.slices_of(slice_.accelerator) if slice_.shape else ():
        if larger.chips <= slice_.chips:
            continue
        target = dataclasses.replace(plan.target, slice=larger, devices=())
        for mesh in meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices):
            shards = mesh.data * mesh.fsdp
            choice = with_choice(config, "full", mesh, -(-config.batch_size // shards) * shards, 1)
            if estimate_plan(choice, target, memory).fits:
                return f"{larger.libtpu_name} with {format_choice(choice, config)} (by estimate)"
    return None


def format_choice(config: TrainConfig, base: TrainConfig | None = None) -> str:
    """The keys that a search chooses, as flags without dashes; with `base`, those that differ from it."""
    before = {} if base is None else _choices(base)
    return " ".join(f"config.{key}={value}" for key, value in _choices(config).items() if before.get(key) != value)


def _choices(config: TrainConfig) -> dict[str, str | int]:
    return {
        "model.remat": config.model.remat,
        "mesh.data": config.mesh.data,
        "mesh.fsdp": config.mesh.fsdp,
        "batch_size": config.batch_size,
        "objective.accumulate_steps": config.objective.accumulate_steps,
    }
