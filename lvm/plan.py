"""Plan a training run for absent devices: memory, communication, step time.

    lvm plan --config=configs/lvm_3b.py --topology=v5e:16x16

For TPUs the training step is compiled for the topology and its program is analyzed; for GPUs the same figures are
estimated. A tokenizer's config is planned, too; on GPUs without the memory of its activations.
"""

import dataclasses
import json
from collections.abc import Sequence

import jax

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.hardware.accelerators import GIB, resolve
from lvm.hardware.compiler_options import compiler_options
from lvm.planning import search
from lvm.planning.estimate import MemoryModel
from lvm.planning.plan import Plan, Target, make_plan, resolve_config, with_choice
from lvm.planning.report import format_plan
from lvm.planning.topology import topology_devices
from lvm.training.config import TrainConfig
from tokenizer.config import TokenizerConfig
from tokenizer.planning import plan_tokenizer


def make_target(name: str, slices: int = 1, hbm_gib: float = 0.0) -> Target:
    """The hardware to plan for, by a name that `lvm.hardware.accelerators.resolve` takes.

    `hbm_gib` is the memory of a GPU in GiB; 0 takes the table's.

    Raises:
      UserError: no such hardware, libtpu is not installed, or memory is set for a TPU.
    """
    slice_ = resolve(name)
    if slice_.shape:
        if hbm_gib:
            raise UserError(f"--hbm_gib={hbm_gib} is for GPUs; {slice_.generation} has a fixed memory")
        return Target(slice_, slices, tuple(topology_devices(slice_, slices)), slice_.accelerator.hbm_bytes)
    if slices > 1:
        raise UserError(f"--slices={slices} is for TPUs; use a number of GPUs, as in {slice_.generation}-64")
    jax.config.update("jax_platforms", "cpu")
    return Target(slice_, 1, (), int(hbm_gib * GIB) or slice_.accelerator.hbm_bytes)


def plan(config: TrainConfig, target: Target, num_codes: int = 8192) -> tuple[Plan, str | None]:
    """The plan of a configuration, and an error message with the nearest that would fit if it does not.

    Raises:
      UserError: the mesh does not divide chips, model or batch.
    """
    memory = MemoryModel()
    result = make_plan(resolve_config(config, target, num_codes), target, memory)
    return result, None if result.fits else _too_large(result, memory)


def search_plan(config: TrainConfig, target: Target, num_codes: int = 8192) -> list[Plan]:
    """Plans tried by a search, the proposal last. Batch size and mesh are searched, except `sequence` and `tensor`.

    Raises:
      UserError: nothing fits; names the smallest slice that would.
    """
    memory = MemoryModel()
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1)
    config = resolve_config(with_choice(config, config.model.remat, mesh, target.chips, 1), target, num_codes)
    plans = search.search(config, target, memory)
    if not plans:
        estimate = make_plan(config, dataclasses.replace(target, devices=()), memory)
        raise UserError(_too_large(estimate, memory))
    return plans


def _too_large(plan: Plan, memory: MemoryModel) -> str:
    needed, usable = plan.total_bytes / GIB, plan.target.usable_bytes / GIB
    nearest = search.nearest_fit(plan, memory)
    hint = f"the nearest that fits: {nearest}" if nearest else "nothing similar fits"
    return f"{plan.target.name}: needs {needed:.2f} GiB per chip, {usable:.2f} are usable; {hint}"


def _run(args: cli.Args) -> None:
    if "adversarial" in args.config:
        _plan_tokenizer(args)
        return
    config = from_config_dict(TrainConfig, args.config)
    target = make_target(args.topology, args.slices, args.hbm_gib)
    compiler_options(target.slice.accelerator.platform, config.compiler_options)  # rejects invalid ones early
    error = None
    if args.search:
        plans = search_plan(config, target, args.num_codes)
    else:
        result, error = plan(config, target, args.num_codes)
        plans = [result]
    if args.json:
        print(json.dumps(plans[-1].to_json()))
    else:
        for tried in plans[:-1]:
            print(f"tried {search.format_choice(tried.config)}: {tried.total_bytes / GIB:.2f} GiB per chip")
        if args.search:
            print(f"proposed: {search.format_choice(plans[-1].config)}\n")
        print("\n".join(format_plan(plans[-1])))
    if error:
        raise UserError(error)


def _plan_tokenizer(args: cli.Args) -> None:
    if args.search or args["num_codes"].present:
        raise UserError("--search, --num_codes: the config is a tokenizer's, which has neither")
    config = from_config_dict(TokenizerConfig, args.config)
    result, error = plan_tokenizer(config, make_target(args.topology, args.slices, args.hbm_gib))
    print(json.dumps(result.to_json()) if args.json else "\n".join(result.lines()))
    if error:
        raise UserError(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("topology", None, "slice or GPUs: v5e-256, v5litepod-256, v5e:16x16, h100-64", required=True)
    flags.integer("slices", 1, "number of slices", lower_bound=1)
    flags.boolean("search", False, "search for batch size, rematerialization and mesh")
    flags.boolean("json", False, "print one JSON object")
    flags.integer("num_codes", 8192, "codebook size of the tokenizer", lower_bound=1)
    flags.float("hbm_gib", 0.0, "memory of a GPU in GiB; 0 takes the table's", lower_bound=0.0)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
