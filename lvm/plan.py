"""Plan a training run for absent devices: memory, communication, step time.

    lvm plan --config=configs/lvm_3b.py --topology=v5e:16x16

For TPUs the training step is compiled for the topology and its program is analyzed; for GPUs the same figures are
estimated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.hardware import compiler_options as compiler_flags
from lvm.hardware.accelerators import GIB, resolve
from lvm.planning import report, search, topology
from lvm.planning.estimate import Memory
from lvm.planning.plan import Plan, Target, make_plan, resolve_config
from lvm.training.config import TrainConfig


def target_of(name: str, slices: int = 1, hbm_gib: float = 0.0) -> Target:
    """Where a step is to run.

    Args:
      name: as `lvm.hardware.accelerators.resolve` takes it.
      slices: of it.
      hbm_gib: memory of a GPU in place of the table's; 0 takes that.

    Raises:
      UserError: no such chips, libtpu isn't there, or memory is given for a TPU.
    """
    described = resolve(name)
    if described.shape:
        if hbm_gib:
            raise UserError(f"--hbm_gib: {hbm_gib}; the memory of {described.generation} is known")
        devices = tuple(topology.devices(described, slices))
        return Target(described, slices, devices, described.accelerator.hbm_bytes)
    if slices > 1:
        raise UserError(
            f"--slices: {slices}; GPUs have none: name their number, as in {described.generation}-64"
        )
    jax.config.update("jax_platforms", "cpu")
    return Target(described, 1, (), int(hbm_gib * GIB) or described.accelerator.hbm_bytes)


def plan(config: TrainConfig, target: Target, num_codes: int = 8192) -> tuple[Plan, str | None]:
    """The plan of a configuration, and a line with the nearest that would fit where it doesn't.

    Raises:
      UserError: the mesh doesn't divide chips, model or batch.
    """
    memory = Memory()
    found = make_plan(resolve_config(config, target, num_codes), target, memory)
    return found, None if found.fits else _too_large(found, memory)


def search_plan(config: TrainConfig, target: Target, num_codes: int = 8192) -> list[Plan]:
    """What `--search` compiled, the proposal last.

    Raises:
      UserError: nothing fits; names the smallest slice that would.
    """
    memory = Memory()
    start = resolve_config(_any_batch(config, target), target, num_codes)
    found = search.best(start, target, memory)
    if not found:
        raise UserError(_too_large(make_plan(start, dataclasses.replace(target, devices=()), memory), memory))
    return found


def _any_batch(config: TrainConfig, target: Target) -> TrainConfig:
    """With a batch and a mesh that divide: the search has its own, but for `sequence` and `tensor`."""
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1)
    parts = dataclasses.replace(config.objective, accumulate_steps=1)
    return dataclasses.replace(config, mesh=mesh, batch_size=target.chips, objective=parts)


def _too_large(found: Plan, memory: Memory) -> str:
    target = found.target
    needed, usable = found.total_bytes / GIB, target.usable_bytes / GIB
    problem = f"{target.name}: needs {needed:.2f} GiB a chip, {usable:.2f} may be used"
    nearest = search.nearest(found, memory)
    return f"{problem}; the nearest that fits: {nearest[0]}" if nearest else f"{problem}; nothing nearer fits"


def _run(args: cli.Args) -> None:
    config = from_config_dict(TrainConfig, args.config)
    target = target_of(args.topology, args.slices, args.hbm_gib)
    compiler_flags.compiler_options(
        target.described.accelerator.platform, config.flags
    )  # refused before a compile
    complaint = None
    if args.search:
        plans = search_plan(config, target, args.num_codes)
    else:
        found, complaint = plan(config, target, args.num_codes)
        plans = [found]
    if args.json:
        print(json.dumps(plans[-1].to_json()))
    else:
        for found in plans[:-1]:
            print(f"tried {search.keys(found.config)}: {found.total_bytes / GIB:.2f} GiB a chip")
        if args.search:
            print(f"proposed: {search.keys(plans[-1].config)}\n")
        print("\n".join(report.lines(plans[-1])))
    if complaint:
        raise UserError(complaint)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string(
        "topology", None, "v5e-256, v5litepod-256 or v5e:16x16; GPUs are h100-8, h200-64 …", required=True
    )
    flags.integer("slices", 1, "slices of it", lower_bound=1)
    flags.boolean("search", False, "find batch, rematerialisation and mesh")
    flags.boolean("json", False, "print one JSON object")
    flags.integer("num_codes", 8192, "codes of the tokenizer, as the store would say", lower_bound=1)
    flags.float("hbm_gib", 0.0, "memory of a GPU in GiB; 0 takes the table's", lower_bound=0.0)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
