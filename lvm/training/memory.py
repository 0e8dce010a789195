"""Whether a step fits in its devices' memory, what takes it, and what would fit instead: all found by compiling."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lvm.common import distributed
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.hardware import accelerators
from lvm.model.transformer import REMAT_POLICIES
from lvm.training.step import Step

_GIB = 2**30
USABLE_FRACTION = 0.95  # of a device's memory: allocators leave gaps, and evaluation has a program of its own
_MOST_PARTS = 64  # of a batch, that are proposed
MakeStep = Callable[[str, int], Step]  # (policy of rematerialisation, parts of a batch) → the step with them


def find_fitting_step(make_step: MakeStep, policy: str, parts: int) -> Step:
    """The compiled step with this policy; with "auto", the one with the lightest that fits.

    Args:
      make_step: see `MakeStep`.
      policy: of `lvm.model.transformer.REMAT_POLICIES`, or "auto".
      parts: `accumulate_steps`.

    Raises:
      UserError: it doesn't fit; says what takes the memory and the nearest that would fit.
    """
    tried: list[str] = []
    limit = 0
    for name in REMAT_POLICIES if policy == "auto" else (policy,):
        step = make_step(name, parts)
        known = memory_limit(step.mesh)
        if known is None:
            if policy != "auto":
                return step
            kind = step.mesh.devices.flat[0].device_kind
            raise UserError(
                f"config.model.remat: auto needs to know the memory of {kind!r}, which isn't in "
                "lvm/hardware/accelerators.py; "
                "name a policy"
            )
        limit, needed = known, required_bytes(step)
        if needed is not None and needed <= limit:
            if policy == "auto":
                log_info(f"remat {name}: {needed / _GIB:.2f} of {limit / _GIB:.1f} GiB a device")
            return step
        tried.append(f"{name} {'too much for the compiler' if needed is None else f'{needed / _GIB:.2f}'}")
    raise UserError(
        f"config.model.remat: {policy} doesn't fit in {limit / _GIB:.2f} GiB a device (GiB needed: {', '.join(tried)}; "
        f"{format_breakdown(step)}); {_nearest(make_step, policy, parts, limit)}"
    )


def explain_out_of_memory(make_step: MakeStep, step: Step, policy: str, parts: int) -> str:
    """What takes the memory of a step that ran out of it, and the nearest that needs less.

    Args:
      make_step: see `MakeStep`.
      step: the one that ran, compiled.
      policy: its policy of rematerialisation.
      parts: its parts of a batch.
    """
    needed = required_bytes(step) or 0
    found = _nearest(make_step, policy, parts, needed - 1)
    return f"the step alone needs {needed / _GIB:.2f} GiB a device ({format_breakdown(step)}); {found}"


def _nearest(make_step: MakeStep, policy: str, parts: int, limit: int) -> str:
    """What would fit: a heavier policy first, then smaller parts of a batch with the heaviest."""
    names = list(REMAT_POLICIES)
    heavier = [] if policy == "auto" else names[names.index(policy) + 1 :]
    smaller = [parts * 2**power for power in range(1, 7) if parts * 2**power <= _MOST_PARTS]
    for name, count in [(name, parts) for name in heavier] + [(names[-1], count) for count in smaller]:
        try:
            step = make_step(name, count)
        except UserError:  # the mesh doesn't divide such parts
            continue
        needed = required_bytes(step)
        if needed is not None and needed <= limit:
            found = f"config.model.remat={name} with config.objective.accumulate_steps={count}"
            return f"{found} would fit ({needed / _GIB:.2f} GiB)"
    return "nor would smaller parts of a batch: a larger config.mesh.fsdp might"


def required_bytes(step: Step) -> int | None:
    """What the update needs on each device; None where the compiler already refuses it."""
    try:
        return step.memory_bytes()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def state_bytes(step: Step) -> dict[str, int]:
    """Bytes a device of parameters, the rest of the state, and a batch."""

    def size(tree: Any) -> int:
        shards = [(np.prod(x.sharding.shard_shape(x.shape)), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
        return int(sum(count * width for count, width in shards))

    parts = {"parameters": size(step.state["params"]), "optimizer": size(step.state["training"])}
    return parts | {"batch": size(step.batch)}


def format_breakdown(step: Step) -> str:
    """GiB a device of parameters, the rest of the state, a batch and temporaries, as one line."""
    parts = state_bytes(step)
    needed = required_bytes(step)
    if needed is not None:
        parts["temporaries"] = needed - sum(parts.values())
    return ", ".join(f"{name} {amount / _GIB:.2f}" for name, amount in parts.items())


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that a step may use on each device; the same on every process, since all must choose the same program.

    None where neither the device's runtime nor `lvm.hardware.accelerators` knows.
    """
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device = mine[0] if mine else mesh.devices.flat[0]
    limit = accelerators.memory_bytes(device)
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, len(mine))
    return None if limit is None else int(USABLE_FRACTION * distributed.broadcast(limit))
