"""Finds what fits: by a formula fitted to a few compiles, the winner confirmed by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from lvm.hardware import accelerators
from lvm.hardware.accelerators import Slice
from lvm.model.transformer import REMAT_POLICIES
from lvm.planning import meshes
from lvm.planning.estimate import Memory
from lvm.planning.plan import Plan, Target, estimated, make_plan, with_choice

if TYPE_CHECKING:
    from lvm.training.config import TrainConfig

MOST_COMPILES = 4  # that the formula is fitted to
_MOST_ROWS = 16  # on one chip
_HEADROOM = 0.97  # of what a step may take: what is proposed by formula must not just miss


def best(config: TrainConfig, target: Target, memory: Memory) -> list[Plan]:
    """Plans on the way to the fastest that fits; the last one is it, compiled where anything can be.

    Candidates are all meshes that divide, 1 to 16 rows a chip, and every policy of rematerialisation. The fastest has
    the least roofline time a row; of those within a hundredth of it, the lightest rematerialisation, then the largest
    batch. Nothing is returned where nothing fits by the formula.

    Args:
      config: resolved; its mesh says which `sequence` and `tensor`.
      target: where.
      memory: the formula; learns from each compile.
    """
    tried: list[Plan] = []
    # The last one that the formula proposes is compiled too: it has been fitted to those before.
    while len(tried) <= MOST_COMPILES:
        found = _fastest(config, target, memory, tried)
        if found is None or any(plan.config == found.config for plan in tried):
            break
        if not target.devices:
            return [found]
        tried.append(make_plan(found.config, target, memory))
    fitting = [plan for plan in tried if plan.fits]
    if not fitting:
        return []
    winner = min(fitting, key=_order(min(_per_row(plan) for plan in fitting)))
    return [*(plan for plan in tried if plan is not winner), winner]


def _fastest(config: TrainConfig, target: Target, memory: Memory, tried: list[Plan]) -> Plan | None:
    plans = [p for p in _candidates(config, target, memory) if _may_fit(p, tried)]
    return min(plans, key=_order(min(_per_row(plan) for plan in plans))) if plans else None


def _candidates(config: TrainConfig, target: Target, memory: Memory) -> list[Plan]:
    found = []
    for mesh in meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices):
        for remat in REMAT_POLICIES:
            for rows in (1, 2, 4, 8, _MOST_ROWS):
                choice = with_choice(config, remat, mesh, rows * mesh.data * mesh.fsdp, 1)
                found.append(estimated(choice, target, memory))
    return found


def _may_fit(plan: Plan, tried: list[Plan]) -> bool:
    for other in tried:
        if other.config == plan.config:
            return other.fits
    return plan.total_bytes <= _HEADROOM * plan.target.usable_bytes


def _per_row(plan: Plan) -> float:
    return plan.least_seconds / plan.config.batch_size


def _order(least: float) -> Callable[[Plan], tuple[float, int, int, int]]:
    def key(plan: Plan) -> tuple[float, int, int, int]:
        slower = _per_row(plan) / least
        policy = list(REMAT_POLICIES).index(plan.config.model.remat)
        # Within a hundredth all are alike.
        return (0.0 if slower < 1.01 else slower, policy, -plan.config.batch_size, plan.config.mesh.fsdp)

    return key


def nearest(plan: Plan, memory: Memory) -> tuple[str, Plan | Slice] | None:
    """What would fit in place of a plan that doesn't, as keys of the configuration or a larger slice.

    First a heavier policy of rematerialisation, then smaller parts of the batch, then more chips to split the state
    over, then a larger slice. Where programs can be compiled, the proposal was, and fits.
    """
    for choice in _easier(plan):
        guess = estimated(choice, plan.target, memory)
        if guess.total_bytes > plan.target.usable_bytes:
            continue
        found = make_plan(choice, plan.target, memory) if plan.target.devices else guess
        if found.fits:
            return _keys(plan.config, choice), found
    return _larger(plan, memory)


def _easier(plan: Plan) -> list[TrainConfig]:
    config, target = plan.config, plan.target
    policies, rows, parts = list(REMAT_POLICIES), config.batch_size, config.objective.accumulate_steps
    heavier = policies[policies.index(config.model.remat) + 1 :]
    found = [with_choice(config, remat, config.mesh, rows, parts) for remat in heavier]
    possible = meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices, rows)
    for mesh in sorted(possible, key=lambda mesh: mesh.fsdp):
        if mesh.fsdp < config.mesh.fsdp:
            continue
        most = rows // (mesh.data * mesh.fsdp)
        for count in (parts * 2**power for power in range(7)):
            if most % count == 0 and (mesh, count) != (config.mesh, parts):
                found.append(with_choice(config, "full", mesh, rows, count))
    return found


def _larger(plan: Plan, memory: Memory) -> tuple[str, Slice] | None:
    """The smallest larger slice of the same chips, by the formula alone."""
    described, config = plan.target.described, plan.config
    for larger in accelerators.slices_of(described.accelerator) if described.shape else ():
        if larger.chips <= described.chips:
            continue
        target = dataclasses.replace(plan.target, described=larger, devices=())
        possible = meshes.valid_meshes(config.model, config.mesh, target.chips, target.slices)
        for mesh in possible:
            ways = mesh.data * mesh.fsdp
            choice = with_choice(config, "full", mesh, -(-config.batch_size // ways) * ways, 1)
            if estimated(choice, target, memory).fits:
                return f"{larger.libtpu_name} with {_keys(config, choice)} (by estimate)", larger
    return None


def keys(config: TrainConfig) -> str:
    """What a search chooses, as it is said at the command line."""
    return " ".join(f"config.{key}={value}" for key, value in _choices(config).items())


def _keys(old: TrainConfig, new: TrainConfig) -> str:
    before = _choices(old)
    return " ".join(f"config.{key}={value}" for key, value in _choices(new).items() if before[key] != value)


def _choices(config: TrainConfig) -> dict[str, str | int]:
    return {
        "model.remat": config.model.remat,
        "mesh.data": config.mesh.data,
        "mesh.fsdp": config.mesh.fsdp,
        "batch_size": config.batch_size,
        "objective.accumulate_steps": config.objective.accumulate_steps,
    }
