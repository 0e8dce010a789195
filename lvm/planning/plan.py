"""Plan of a training step on devices that are not attached: memory, collectives, roofline."""

import dataclasses
import functools
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lvm.common.config import to_json
from lvm.common.logging import log_info
from lvm.data.mixture.rows import batch_spec
from lvm.hardware import compiler_options
from lvm.hardware.accelerators import Slice
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import REMAT_POLICIES, ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.planning import collectives, meshes, roofline
from lvm.planning.collectives import BETWEEN_SLICES, PADDING, Collective
from lvm.planning.estimate import MemoryModel
from lvm.planning.hlo import Program
from lvm.training import optimizer
from lvm.training.config import TrainConfig
from lvm.training.memory import USABLE_FRACTION, required_bytes, state_bytes
from lvm.training.next_token import NextTokenTask
from lvm.training.step import Step
from lvm.training.task import State

_COMPILE_THRESHOLD = 1.3  # a policy whose estimate exceeds the usable memory by this factor is not compiled


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware that a step is planned for.

    Attributes:
      devices: devices of all slices, as libtpu describes them; () where nothing can be compiled (GPUs).
      hbm_bytes: memory of a chip.
    """

    slice: Slice
    slices: int
    devices: tuple[Any, ...]
    hbm_bytes: int

    @property
    def chips(self) -> int:
        return self.slice.chips * self.slices

    @property
    def usable_bytes(self) -> int:
        """Memory of a chip that a step may use."""
        return int(USABLE_FRACTION * self.hbm_bytes)

    @property
    def name(self) -> str:
        name = self.slice.libtpu_name or self.slice.name
        return name if self.slices == 1 else f"{self.slices} × {name}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Result of planning; bytes are per chip.

    Attributes:
      config: with mesh, vocabulary size and rematerialization policy resolved.
      params_bytes, optimizer_bytes, temp_bytes, total_bytes: memory; the total includes a batch.
      hbm_traffic: bytes read and written per step.
      collectives: bytes received, by kind.
      compile_seconds: None for an estimate.
      notes: caveats for the reader.
    """

    target: Target
    config: TrainConfig
    params_bytes: int
    optimizer_bytes: int
    temp_bytes: int
    total_bytes: int
    hbm_traffic: int
    collectives: list[Collective]
    compile_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.target.usable_bytes

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs by `lvm.model.flops`, causal."""
        model = self.config.model
        return self.config.batch_size * model.context * train_flops_per_token(model, model.context, "causal")

    @functools.cached_property
    def roofline_seconds(self) -> dict[str, float]:
        """Step time if each resource were the only limit, at its published peak: `flops`, `hbm`, `ici`, `network`.

        Padding counts as sent; `network` is there if slices exchange anything.
        """
        target, accelerator = self.target, self.target.slice.accelerator
        within = sum(c.bytes for c in self.collectives if c.kind != BETWEEN_SLICES)
        between = sum(c.bytes for c in self.collectives if c.kind == BETWEEN_SLICES)
        flops = roofline.hardware_flops(self.config.model, self.config.batch_size)
        seconds = {
            "flops": flops / target.chips / accelerator.peak_flops,
            "hbm": self.hbm_traffic / accelerator.hbm_bandwidth,
            "ici": within / target.slice.link_bandwidth,
        }
        if between and accelerator.network_bandwidth:
            seconds["network"] = between / accelerator.network_bandwidth
        return seconds

    @property
    def min_step_seconds(self) -> float:
        """Step time if the slowest resource hides all others."""
        return max(self.roofline_seconds.values())

    @property
    def ideal_bytes(self) -> dict[str, float]:
        """Bytes that ideal fully sharded training would receive, by kind."""
        return collectives.ideal_collective_bytes(self.config, self.target.slices)

    @property
    def ideal_ratio(self) -> float | None:
        """Bytes received within a slice, without padding, relative to the ideal; None if the ideal is 0."""
        received = sum(c.bytes for c in self.collectives if c.kind not in (PADDING, BETWEEN_SLICES))
        ideal = sum(size for kind, size in self.ideal_bytes.items() if kind != BETWEEN_SLICES)
        return received / ideal if ideal else None

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        memory = ("params_bytes", "optimizer_bytes", "temp_bytes", "total_bytes")
        return {
            "topology": self.target.slice.libtpu_name or self.target.slice.name,
            "chips": self.target.chips,
            "config": to_json(self.config),
            "per_chip": {n: getattr(self, n) for n in memory} | {"hbm_bytes": self.target.hbm_bytes},
            "fits": self.fits,
            "flops_per_step": self.flops_per_step,
            "collectives": [{"kind": c.kind, "bytes": c.bytes, "count": c.count} for c in self.collectives],
            "roofline_seconds": {name: self.roofline_seconds[name] for name in ("flops", "hbm", "ici")},
            "compile_seconds": self.compile_seconds,
        }


def resolve_config(config: TrainConfig, target: Target, num_codes: int) -> TrainConfig:
    """Sets the vocabulary size for `num_codes` codes, and replaces -1 in the mesh and `rows_per_device`.

    Raises:
      UserError: the mesh does not divide chips, model or batch.
    """
    size = config.model.vocabulary_size or Vocabulary.for_codes(num_codes).size
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary_size=size))
    mesh = meshes.validate_mesh(config, target.chips, target.slices)
    return dataclasses.replace(
        config, mesh=mesh, objective=config.objective.for_mesh(config.batch_size, mesh.data, mesh.fsdp)
    )


def with_choice(
    config: TrainConfig, remat: str, mesh: MeshConfig, batch_size: int, accumulate_steps: int
) -> TrainConfig:
    """The configuration with the keys that a search chooses."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        mesh=mesh,
        batch_size=batch_size,
        objective=dataclasses.replace(config.objective, accumulate_steps=accumulate_steps, rows_per_device=0),
    )


def make_plan(config: TrainConfig, target: Target, memory: MemoryModel) -> Plan:
    """Compiles where `target` has devices, else estimates; `remat="auto"` becomes the lightest policy that fits.

    `config` is from `resolve_config`; `memory` is updated with what is compiled.
    """
    policies = list(REMAT_POLICIES) if config.model.remat == "auto" else [config.model.remat]
    for policy in policies:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
        if policy != policies[-1]:
            estimate = sum(_state_bytes(config)) + memory.temp_bytes(config)
            if estimate > _COMPILE_THRESHOLD * target.usable_bytes:
                continue
        plan = (compile_plan if target.devices else estimate_plan)(config, target, memory)
        if plan.fits:
            break
    return plan


def compile_plan(config: TrainConfig, target: Target, memory: MemoryModel) -> Plan:
    """Compiles the step as training would, and analyzes the program."""
    mesh = make_mesh(config.mesh, target.devices)
    platform = target.slice.accelerator.platform
    options = compiler_options.compiler_options(platform, config.compiler_options, config.deterministic)
    step = Step(_make_task(config, mesh), mesh, config.seed, config.mesh.zero1, options)
    mesh_text = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one chip"
    log_info(f"compiling for {target.slice.name}, {mesh_text}, remat {config.model.remat}: minutes on a few cores")
    start = time.monotonic()
    needed = required_bytes(step)
    seconds = time.monotonic() - start
    if needed is None:  # rejected by the compiler, which does not say by how much
        estimate = estimate_plan(config, target, memory)
        total = max(estimate.total_bytes, target.hbm_bytes + 1)
        note = "the compiler rejects it as too large; temporaries and collectives are estimates"
        return dataclasses.replace(estimate, total_bytes=total, compile_seconds=seconds, notes=(note,))
    executable = step.compile()
    program = Program(executable.as_text())
    temporaries = int(executable.memory_analysis().temp_size_in_bytes)
    memory.observe(config, float(temporaries))
    state, traffic = state_bytes(step), roofline.hbm_bytes(program)
    sent = collectives.collective_bytes(program, collectives.weight_shapes(config.model), target.chips)
    loops = ", ".join(program.unknown_trip_counts)
    notes = (f"loops of unknown trip count are counted once: {loops}",) if loops else ()
    sizes = state["parameters"], state["optimizer"], temporaries, needed
    return Plan(target, config, *sizes, traffic, sent, seconds, notes)


def estimate_plan(config: TrainConfig, target: Target, memory: MemoryModel) -> Plan:
    """Plans by formula, without compiling."""
    params_bytes, optimizer_bytes = _state_bytes(config)
    state, temporaries = params_bytes + optimizer_bytes, int(memory.temp_bytes(config))
    batch = 12 * config.batch_size * config.model.context // (config.mesh.data * config.mesh.fsdp)
    sizes = params_bytes, optimizer_bytes, temporaries, state + temporaries + batch
    traffic = 2 * temporaries + 3 * state  # activations are written and read once, the state in every pass
    ideal = collectives.ideal_collective_bytes(config, target.slices)
    sent = [Collective(kind, size, 0) for kind, size in ideal.items()]
    notes = ("an estimate: no program was compiled, memory is a formula and collectives are ideal",)
    return Plan(target, config, *sizes, traffic, sent, notes=notes)


def _make_task(config: TrainConfig, mesh: Mesh) -> NextTokenTask:
    tokens = config.batch_size * config.model.context
    total_steps = config.loop.with_total_steps(tokens).total_steps
    tx, schedule = optimizer.build(config.optimizer, total_steps, tokens, config.model)
    spec = batch_spec(config.batch_size, config.model.context, config.data.packing == "whole")
    return NextTokenTask(config.model, spec, list(config.data.components), tx, schedule, mesh, config.objective)


def _state_bytes(config: TrainConfig) -> tuple[int, int]:
    """Bytes per chip of the parameters and of the rest of the state; matrices are sharded, vectors are replicated."""
    tokens = config.batch_size * config.model.context
    total_steps = config.loop.with_total_steps(tokens).total_steps
    model = dataclasses.replace(config.model, attention="xla", remat="none")  # neither changes the state
    state = _state_shapes(model, config.optimizer, total_steps, tokens)
    shards = config.mesh.fsdp * config.mesh.tensor

    def size(tree: Any, shards: int) -> int:
        return sum(
            x.size * x.dtype.itemsize // (shards if x.ndim > 1 and x.shape[-1] > 1 else 1)
            for x in jax.tree.leaves(tree)
        )

    copies = config.mesh.data if config.mesh.zero1 else 1
    return size(state["params"], shards), size(state["training"], shards * copies)


@functools.cache  # a search asks for the same state with many meshes and rematerialization policies
def _state_shapes(
    model: ModelConfig, config: optimizer.OptimizerConfig, total_steps: int, tokens_per_step: int
) -> State:
    tx, schedule = optimizer.build(config, total_steps, tokens_per_step, model)
    task = NextTokenTask(model, batch_spec(1, model.context, False), (), tx, schedule)
    return jax.eval_shape(task.init, jax.random.key(0))
