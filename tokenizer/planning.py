"""Plan of a tokenizer's training step on devices that are not attached: memory, FLOPs, least time."""

import dataclasses
import functools
from typing import Any

import jax

from lvm.common.errors import UserError
from lvm.common.logging import duration, log_info
from lvm.hardware.accelerators import GIB, TERA
from lvm.hardware.sharding import make_mesh, resolve_mesh
from lvm.model.nnx_utils import count_params
from lvm.planning import roofline
from lvm.planning.hlo import Program
from lvm.planning.meshes import format_mesh
from lvm.planning.operations import count_flops
from lvm.planning.plan import Target
from lvm.training.memory import required_bytes, state_bytes
from lvm.training.step import Step
from tokenizer.config import TokenizerConfig, build_task


@dataclasses.dataclass(frozen=True)
class TokenizerPlan:
    """Result of planning; bytes are per chip.

    Attributes:
      config: with the mesh resolved.
      params: of the network.
      flops_per_step: of matrix products and convolutions, with the discriminator.
      state_bytes: parameters, optimizers, averages, discriminator and perceptual loss.
      total_bytes: with a batch and temporaries; None where nothing is compiled, or the compiler refuses the step.
      hbm_traffic: bytes read and written per step; None likewise.
    """

    target: Target
    config: TokenizerConfig
    params: int
    flops_per_step: int
    state_bytes: int
    total_bytes: int | None
    hbm_traffic: int | None

    @property
    def fits(self) -> bool | None:
        """None where nothing is compiled: the memory of activations is unknown."""
        if not self.target.devices:
            return None
        return self.total_bytes is not None and self.total_bytes <= self.target.usable_bytes

    @property
    def roofline_seconds(self) -> dict[str, float]:
        """Step time if each resource were the only limit, at its published peak."""
        accelerator = self.target.slice.accelerator
        seconds = {"flops": self.flops_per_step / self.target.chips / accelerator.peak_flops}
        return seconds if self.hbm_traffic is None else seconds | {"hbm": self.hbm_traffic / accelerator.hbm_bandwidth}

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        return {
            "topology": self.target.slice.libtpu_name or self.target.slice.name,
            "chips": self.target.chips,
            "parameters": self.params,
            "per_chip": {
                "state_bytes": self.state_bytes, "total_bytes": self.total_bytes, "hbm_bytes": self.target.hbm_bytes
            },
            "fits": self.fits,
            "flops_per_step": self.flops_per_step,
            "roofline_seconds": self.roofline_seconds,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The report as text."""
        config, target = self.config, self.target
        seconds = self.roofline_seconds
        run = config.loop.total_steps * max(seconds.values())
        images = config.batch_size * config.loop.total_steps
        memory = f"{self.state_bytes / GIB:.2f} GiB per chip of state"
        if not target.devices:
            memory += f" of {target.hbm_bytes / GIB:.2f}; activations are unknown: no program was compiled"
        elif self.total_bytes is None:
            memory += "; the compiler rejects the step as too large"
        else:
            verdict = "fits" if self.fits else "DOES NOT FIT"
            memory += f", {self.total_bytes / GIB:.2f} in all; {verdict}: {target.usable_bytes / GIB:.2f} are usable"
        return [
            f"{target.name}: {target.chips} chips, mesh {format_mesh(config.mesh)}",
            f"{self.params:,} parameters, {config.batch_size} images of {config.model.resolution}², {memory}",
            f"{self.flops_per_step / TERA:,.1f} TFLOP per step of matrix products and convolutions",
            *(f"at least {value:.4f} s per step by {name}" for name, value in seconds.items()),
            f"{images:,} images in {config.loop.total_steps:,} steps: at least {duration(run)}",
        ]


def plan_tokenizer(config: TokenizerConfig, target: Target) -> tuple[TokenizerPlan, str | None]:
    """The plan of a configuration, and an error message if it doesn't fit. Compiles where `target` has devices.

    Raises:
      UserError: the mesh doesn't divide the chips or the batch.
    """
    chips = target.chips
    mesh = resolve_mesh(config.mesh, chips)
    if mesh.data * mesh.fsdp != chips or config.batch_size % chips:
        raise UserError(
            f"config.mesh: {format_mesh(mesh)} must multiply to {chips} chips, and config.batch_size="
            f"{config.batch_size} be a multiple of them"
        )
    config = dataclasses.replace(config, mesh=mesh)
    task = build_task(config, config.loop.total_steps)
    state = jax.eval_shape(task.init, jax.random.key(0))
    update = functools.partial(task.update_in, task.last_phase)
    flops = count_flops(update, state, dict(task.batch_spec), jax.random.key(0))
    params, total, traffic = count_params(state["params"]), None, None
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) // mesh.fsdp
    if target.devices:
        step = Step(task, make_mesh(mesh, target.devices), config.seed, mesh.zero1)
        log_info(f"compiling for {target.slice.name}, {format_mesh(mesh)}: minutes on a few cores")
        sizes = state_bytes(step)
        held, total = sizes["parameters"] + sizes["optimizer"], required_bytes(step)
        traffic = None if total is None else roofline.hbm_bytes(Program(step.compile().as_text()))
    plan = TokenizerPlan(target, config, params, flops, held, total, traffic)
    if plan.fits is not False:
        return plan, None
    error, per_chip = f"{target.name}: the step doesn't fit; ", config.batch_size // chips
    if per_chip == 1:
        return plan, f"{error}one image per chip needs more chips"
    return plan, f"{error}try config.batch_size={chips * (per_chip // 2)}, or more chips"
