"""A plan: what a step needs, sends and takes at least, on chips that aren't there."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax

from lvm.common.config import to_json
from lvm.data.mixture.rows import batch_spec
from lvm.hardware import compiler_options
from lvm.hardware.accelerators import Slice
from lvm.hardware.sharding import AXES, MeshConfig, make_mesh
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import REMAT_POLICIES, ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.planning import collectives, meshes, roofline
from lvm.planning.collectives import Collective
from lvm.planning.estimate import Memory, Shape, count_parameters
from lvm.planning.hlo import Program
from lvm.training import optimizer
from lvm.training.memory import USABLE_FRACTION, required_bytes, state_bytes
from lvm.training.next_token import NextTokenTask
from lvm.training.step import Step

if TYPE_CHECKING:
    from lvm.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a step is to run.

    Attributes:
      described: the slice.
      slices: how many of it.
      devices: of all slices, as libtpu describes them; () where nothing can be compiled (GPUs).
      hbm_bytes: of a chip.
    """

    described: Slice
    slices: int
    devices: tuple[Any, ...]
    hbm_bytes: int

    @property
    def chips(self) -> int:
        return self.described.chips * self.slices

    @property
    def usable_bytes(self) -> int:
        """What a step may take of a chip's memory."""
        return int(USABLE_FRACTION * self.hbm_bytes)

    @property
    def name(self) -> str:
        name = self.described.libtpu_name or self.described.name
        return name if self.slices == 1 else f"{self.slices} × {name}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found; bytes are those of one chip.

    Attributes:
      target: where.
      config: what was planned, its mesh without -1, its vocabulary and rematerialisation chosen.
      parameters: of the model.
      params_bytes, optimizer_bytes, temp_bytes, total_bytes: of memory; the total has a batch too.
      flops_per_step: of the model, by `lvm.model.flops`, attention counted by half.
      sent: collectives by kind.
      theory: what fully sharded training should send, by kind.
      seconds: of a step, at least: by `flops`, `hbm`, `ici`, and `network` between slices.
      compile_seconds: None for an estimate.
      notes: what a reader should know.
    """

    target: Target
    config: TrainConfig
    parameters: int
    params_bytes: int
    optimizer_bytes: int
    temp_bytes: int
    total_bytes: int
    flops_per_step: float
    sent: list[Collective]
    theory: dict[str, float]
    seconds: dict[str, float]
    compile_seconds: float | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.target.usable_bytes

    @property
    def shape(self) -> Shape:
        return shape_of(self.config)

    @property
    def least_seconds(self) -> float:
        """Of a step, when all limits but the slowest are hidden behind it."""
        return max(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        memory = ("params_bytes", "optimizer_bytes", "temp_bytes", "total_bytes")
        return {
            "topology": self.target.described.libtpu_name or self.target.described.name,
            "chips": self.target.chips,
            "config": to_json(self.config),
            "per_chip": {n: getattr(self, n) for n in memory} | {"hbm_bytes": self.target.hbm_bytes},
            "fits": self.fits,
            "flops_per_step": self.flops_per_step,
            "collectives": [{"kind": c.kind, "bytes": c.bytes, "count": c.count} for c in self.sent],
            "roofline_seconds": {name: self.seconds[name] for name in ("flops", "hbm", "ici")},
            "compile_seconds": self.compile_seconds,
        }


def shape_of(config: TrainConfig) -> Shape:
    """What of a resolved configuration decides memory."""
    objective = config.objective
    return Shape(
        config.model, config.mesh, config.batch_size, objective.accumulate_steps, objective.logits_chunk
    )


def resolve_config(config: TrainConfig, target: Target, num_codes: int) -> TrainConfig:
    """With the vocabulary of so many codes, and a mesh that divides chips, model and batch.

    Raises:
      UserError: no mesh like the one asked for does.
    """
    size = config.model.vocabulary_size or Vocabulary.for_codes(num_codes).size
    model = dataclasses.replace(config.model, vocabulary_size=size)
    parts = config.objective.accumulate_steps
    mesh = meshes.checked(model, config.mesh, target.chips, target.slices, config.batch_size, parts)
    return dataclasses.replace(config, model=model, mesh=mesh)


def with_choice(config: TrainConfig, remat: str, mesh: MeshConfig, rows: int, parts: int) -> TrainConfig:
    """The same with other rematerialisation, mesh, batch and parts of it."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        mesh=mesh,
        batch_size=rows,
        objective=dataclasses.replace(config.objective, accumulate_steps=parts),
    )


def make_plan(config: TrainConfig, target: Target, memory: Memory) -> Plan:
    """By compiling where `target` has devices, else by the formula; `remat="auto"` becomes the lightest that fits.

    Args:
      config: resolved (`resolve_config`).
      target: see `Target`.
      memory: the formula; learns what was compiled.
    """
    policies = list(REMAT_POLICIES) if config.model.remat == "auto" else [config.model.remat]
    for policy in policies:
        model = dataclasses.replace(config.model, remat=policy)
        tried = dataclasses.replace(config, model=model)
        last = policy == policies[-1]
        # Far too large by the formula: not worth a compile.
        if not last and _guessed_total(tried, target, memory) > 1.3 * target.usable_bytes:
            continue
        plan = compiled(tried, target, memory) if target.devices else estimated(tried, target, memory)
        if plan.fits or last:
            return plan
    raise AssertionError("the last policy returns")


def compiled(config: TrainConfig, target: Target, memory: Memory) -> Plan:
    """Compiles the step as training would and reads the program."""
    step = make_step(config, target)
    began = time.monotonic()
    needed = required_bytes(step)
    took = time.monotonic() - began
    held = state_bytes(step)
    if needed is None:  # the compiler itself says that it's too large: by how much, only the formula tells
        guess = estimated(config, target, memory)
        total = max(guess.total_bytes, target.hbm_bytes + 1)
        refused = ("the compiler refuses it as too large; temporaries and what is sent are estimates",)
        return dataclasses.replace(guess, total_bytes=total, compile_seconds=took, notes=refused)
    executable = step.compile()
    program = Program(executable.as_text())
    sent = collectives.collective_bytes(program, collectives.weights_of(config.model), target.chips)
    temporary = int(executable.memory_analysis().temp_size_in_bytes)
    memory.learn(shape_of(config), temporary)
    notes = [f"loops whose rounds aren't known are counted once: {', '.join(program.uncounted_loops)}"]
    return _plan(
        config, target, held["parameters"], held["optimizer"], temporary, needed, sent,
        roofline.hbm_bytes(program), took, tuple(notes) if program.uncounted_loops else (),
    )  # fmt: skip


def estimated(config: TrainConfig, target: Target, memory: Memory) -> Plan:
    """By formula alone."""
    params, moments = _state_bytes(config)
    temporary = int(memory.temporaries(shape_of(config)))
    sent = [Collective(kind, size, 0) for kind, size in _theory(config, target).items()]
    # A row of activations is written and read about as often as it is kept; weights in every pass.
    touched = 2 * temporary + 3 * (params + moments)
    note = "an estimate: no program was compiled, memory is a formula and what is sent is theory"
    batch = 12 * config.batch_size * config.model.context // (config.mesh.data * config.mesh.fsdp)
    total = params + moments + temporary + batch
    return _plan(config, target, params, moments, temporary, total, sent, touched, None, (note,))


def make_step(config: TrainConfig, target: Target) -> Step:
    """The step that `lvm.train` would run there."""
    tokens = config.batch_size * config.model.context
    tx, schedule = optimizer.build(config.optimizer, config.loop.with_total_steps(tokens).total_steps, tokens)
    spec = batch_spec(config.batch_size, config.model.context, config.data.packing == "whole")
    mesh = make_mesh(config.mesh, target.devices)
    task = NextTokenTask(
        config.model, spec, list(config.data.components), tx, schedule, mesh, config.objective
    )
    options = compiler_options.compiler_options(
        target.described.accelerator.platform, config.flags, config.deterministic
    )
    return Step(task, mesh, config.seed, config.mesh.zero1, options)


def _plan(
    config: TrainConfig, target: Target, params: int, moments: int, temporary: int, total: int,
    sent: list[Collective], touched: float, took: float | None, notes: tuple[str, ...],
) -> Plan:  # fmt: skip
    model, tokens = config.model, config.batch_size * config.model.context
    computed = roofline.computed_flops(model, config.batch_size)
    return Plan(
        target=target,
        config=config,
        parameters=count_parameters(model),
        params_bytes=params,
        optimizer_bytes=moments,
        temp_bytes=temporary,
        total_bytes=total,
        flops_per_step=tokens * train_flops_per_token(model, model.context, "causal"),
        sent=sent,
        theory=_theory(config, target),
        seconds=roofline.seconds(target.described, target.chips, computed, touched, sent),
        compile_seconds=took,
        notes=notes,
    )


def _theory(config: TrainConfig, target: Target) -> dict[str, float]:
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    parts = config.objective.accumulate_steps
    return collectives.ideal_collective_bytes(config.model, config.batch_size, sizes, target.slices, parts)


def _guessed_total(config: TrainConfig, target: Target, memory: Memory) -> float:
    return sum(_state_bytes(config)) + memory.temporaries(shape_of(config))


def _state_bytes(config: TrainConfig) -> tuple[int, int]:
    """Bytes a chip of the parameters and of the rest of the state: matrices are split, vectors aren't."""
    tokens = config.batch_size * config.model.context
    tx, schedule = optimizer.build(config.optimizer, config.loop.with_total_steps(tokens).total_steps, tokens)
    model: ModelConfig = dataclasses.replace(config.model, attention="xla")
    spec = batch_spec(1, model.context, False)
    task = NextTokenTask(model, spec, [], tx, schedule, None, config.objective)
    state = jax.eval_shape(task.init, jax.random.key(0))
    ways = config.mesh.fsdp * config.mesh.tensor

    def size(tree: Any, ways: int) -> int:
        return sum(
            x.size * x.dtype.itemsize // (ways if x.ndim > 1 and x.shape[-1] > 1 else 1)
            for x in jax.tree.leaves(tree)
        )

    copies = config.mesh.data if config.mesh.zero1 else 1
    return size(state["params"], ways), size(state["training"], ways * copies)
