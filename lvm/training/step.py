"""Compiled training step: a task's update for a mesh. The loop runs it and the planner analyzes it."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture import loader
from lvm.hardware import compiler_options, sharding
from lvm.training.task import Batch, Metrics, PhasedTask, State, TrainTask


class Step:
    """A task's update on a mesh.

    Args:
      task: what is trained.
      mesh: the devices, present or described (`jax.experimental.topologies`).
      seed: everything random follows from it and the step.
      zero1: shards the optimizer state over `data` too.
      options: of `lvm.hardware.compiler_options`; None for the defaults of the mesh's platform.
      initialize: makes the initial state from a fresh one, whose arrays it may delete (warm start).

    Attributes:
      state: shapes, dtypes and shardings of the state.
      batch: the same of a batch.
      rows: int [n], the rows of a global batch on this process's devices, ascending.
      compiler_options: as passed to the compiler.
    """

    def __init__(
        self,
        task: TrainTask,
        mesh: Mesh,
        seed: int,
        zero1: bool = False,
        options: Mapping[str, compiler_options.OptionValue] | None = None,
        initialize: Callable[[State], State] | None = None,
    ):
        self.task, self.mesh, self._seed, self._initialize = task, mesh, seed, initialize
        if options is None:
            options = compiler_options.compiler_options(mesh.devices.flat[0].platform)
        self.compiler_options = dict(options)
        shapes = jax.eval_shape(task.init, jax.random.key(seed))
        self._shardings = sharding.shardings(mesh, shapes, task.logical_axes)
        if zero1:
            self._shardings["training"] = sharding.zero1_shardings(
                shapes["training"], mesh, self._shardings["training"]
            )
        self.state = jax.tree.map(_with_sharding, shapes, self._shardings)
        batch_size = next(iter(task.batch_spec.values())).shape[0]
        rows = sharding.batch_sharding(mesh, batch_size)
        self.batch = {name: _with_sharding(x, rows) for name, x in task.batch_spec.items()}
        self.rows = loader.local_rows(rows, (batch_size,))
        self._compiled: dict[int, Any] = {}  # by phase

    def init(self) -> State:
        """Returns the initial state, created sharded: no device or host ever holds all of a fresh one."""
        state = self.jitted_init()()
        return self._initialize(state) if self._initialize else state

    def jitted_init(self) -> Any:
        """The function without arguments that creates the fresh state, jitted."""
        return jax.jit(lambda: self.task.init(jax.random.key(self._seed)), out_shardings=self._shardings)

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Turns this process's `rows` of a global batch into sharded arrays.

        Raises:
          ValueError: an array has another number of rows.
        """
        for name, x in batch.items():
            if len(x) != len(self.rows):
                raise ValueError(f"{name}: {len(x)} rows, expected {len(self.rows)}")
        return {
            name: loader.to_global(x, self.rows, self.batch[name].sharding, self.batch[name].shape)
            for name, x in batch.items()
        }

    def phase(self, index: int | None) -> int:
        """The phase of the update from step `index` on (`PhasedTask`); of None, the last steps'."""
        if not isinstance(self.task, PhasedTask):
            return 0
        return self.task.last_phase if index is None else self.task.phase(index)

    def lower(self, index: int | None = None) -> Any:
        """Lowers the update (state, batch) → (state, metrics), which donates the state (`jax.stages.Lowered`).

        Args:
          index: of the step that it starts from; None lowers that of the last steps.
        """
        task, phase = self.task, self.phase(index)
        update = functools.partial(task.update_in, phase) if isinstance(task, PhasedTask) else task.update

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            rng = jax.random.fold_in(jax.random.key(self._seed), state["step"])
            return update(state, batch, rng)

        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None))
        return jitted.lower(self.state, self.batch)

    def is_compiled(self, index: int) -> bool:
        """Whether the update from step `index` on needs no compilation."""
        return self.phase(index) in self._compiled

    def compile(self, index: int | None = None) -> Any:
        """Compiles an update, as `lower` names it, at the first call (`jax.stages.Compiled`).

        Raises:
          UserError: the compiler doesn't know one of the options.
        """
        phase = self.phase(index)
        if phase not in self._compiled:
            try:
                self._compiled[phase] = self.lower(index).compile(self.compiler_options or None)
            except jax.errors.JaxRuntimeError as error:
                message = compiler_options.option_error(str(error), self.compiler_options)
                if message is None:
                    raise
                raise UserError(message) from error
        return self._compiled[phase]

    def __call__(self, state: State, batch: Batch, index: int | None = None) -> tuple[State, Metrics]:
        """Runs one update; `state` is donated.

        Args:
          index: the state's step; None reads it from the device where the program depends on it.
        """
        if index is None and isinstance(self.task, PhasedTask):
            index = int(state["step"])
        return self.compile(index)(state, batch)

    def memory_bytes(self) -> int:
        """Bytes that the update needs on each device: state, batch and temporaries, donated buffers counted once."""
        memory = self.compile().memory_analysis()
        buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return buffers + memory.temp_size_in_bytes


def _with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def enable_compilation_cache(folder: str, workdir: epath.Path) -> None:
    """Turns on JAX's persistent compilation cache and logs its hits and misses; call it before the first compile.

    It is in `folder`, or if that is "" in `JAX_COMPILATION_CACHE_DIR`, or else in the workdir's `compilation_cache/`.
    """
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.fspath(workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", folder or default)
    _log_cache_events()


@functools.cache  # one listener a process
def _log_cache_events() -> None:
    messages = {
        "/jax/compilation_cache/cache_hits": "compiled program found in the cache",
        "/jax/compilation_cache/cache_misses": "compiled program not in the cache; added",
    }

    def listen(event: str, **_: object) -> None:
        if event in messages:
            log_info(messages[event])

    jax.monitoring.register_event_listener(listen)
