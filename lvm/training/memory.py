"""Device memory of a training step, measured by compiling it, and settings that would fit."""

import math
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lvm.common import distributed
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.hardware import accelerators
from lvm.model.transformer import REMAT_POLICIES
from lvm.training.step import Step

_GIB = 2**30
USABLE_FRACTION = 0.95  # of a device's memory: allocators fragment, and evaluation runs a program of its own
_MAX_ACCUMULATE_STEPS = 64  # that are suggested
MakeStep = Callable[[str, int], Step]  # (remat policy, accumulate_steps) → step


def find_fitting_step(make_step: MakeStep, policy: str, accumulate_steps: int) -> Step:
    """Returns a compiled step that fits in memory: with `policy`, or for "auto" with the first policy that fits.

    Raises:
      UserError: it doesn't fit; names what takes the memory and the nearest settings that would fit.
    """
    attempts: list[str] = []
    limit = 0
    for name in REMAT_POLICIES if policy == "auto" else (policy,):
        step = make_step(name, accumulate_steps)
        known_limit = memory_limit(step.mesh)
        if known_limit is None:
            if policy != "auto":
                return step
            kind = step.mesh.devices.flat[0].device_kind
            raise UserError(
                f"config.model.remat=auto: the memory of {kind!r} is not in lvm/hardware/accelerators.py; name a policy"
            )
        limit, needed = known_limit, required_bytes(step)
        if needed is not None and needed <= limit:
            if policy == "auto":
                log_info(f"remat {name}: {needed / _GIB:.2f} of {limit / _GIB:.1f} GiB a device")
            return step
        attempts.append(f"{name} {'too much to compile' if needed is None else f'{needed / _GIB:.2f}'}")
    raise UserError(
        f"config.model.remat={policy} doesn't fit in {limit / _GIB:.2f} GiB a device (GiB needed: "
        f"{', '.join(attempts)}; {format_breakdown(step)}); {_suggest(make_step, policy, accumulate_steps, limit)}"
    )


def explain_out_of_memory(make_step: MakeStep, step: Step, policy: str, accumulate_steps: int) -> str:
    """Describes what takes the memory of `step`, which ran out of it, and the nearest settings that need less."""
    needed = required_bytes(step) or 0
    suggestion = _suggest(make_step, policy, accumulate_steps, needed - 1)
    return f"the step alone needs {needed / _GIB:.2f} GiB a device ({format_breakdown(step)}); {suggestion}"


def _suggest(make_step: MakeStep, policy: str, accumulate_steps: int, limit: int) -> str:
    """Tries heavier remat policies first, then smaller micro-batches with the heaviest."""
    policies = list(REMAT_POLICIES)
    heavier = [] if policy == "auto" else policies[policies.index(policy) + 1 :]
    settings = [(name, accumulate_steps) for name in heavier]
    while (accumulate_steps := 2 * accumulate_steps) <= _MAX_ACCUMULATE_STEPS:
        settings.append((policies[-1], accumulate_steps))
    for name, count in settings:
        try:
            step = make_step(name, count)
        except UserError:  # the mesh doesn't divide such micro-batches
            continue
        needed = required_bytes(step)
        if needed is not None and needed <= limit:
            return (
                f"config.model.remat={name} with config.objective.accumulate_steps={count} would fit "
                f"({needed / _GIB:.2f} GiB)"
            )
    return "nor would smaller micro-batches; try a larger config.mesh.fsdp"


def required_bytes(step: Step) -> int | None:
    """Bytes that the update needs on each device; None if the compiler already refuses it."""
    try:
        return step.memory_bytes()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def state_bytes(step: Step) -> dict[str, int]:
    """Bytes a device of the parameters, the rest of the state, and a batch."""
    trees = {"parameters": step.state["params"], "optimizer": step.state["training"], "batch": step.batch}
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    return {name: sum(map(size, jax.tree.leaves(tree))) for name, tree in trees.items()}


def format_breakdown(step: Step) -> str:
    """GiB a device of parameters, optimizer state, batch and temporaries, in one line."""
    sizes = state_bytes(step)
    needed = required_bytes(step)
    if needed is not None:
        sizes["temporaries"] = needed - sum(sizes.values())
    return ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items())


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that a step may use on each device; None if neither the runtime nor `lvm.hardware.accelerators` knows.

    The first process decides for all, since all must choose the same program.
    """
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device = local[0] if local else mesh.devices.flat[0]
    limit = accelerators.memory_bytes(device)
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, len(local))
    return None if limit is None else int(USABLE_FRACTION * distributed.broadcast(limit))
