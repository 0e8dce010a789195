"""The one program that a run repeats: a task's update, compiled for a mesh.

The loop runs it, a plan reads it: both see the same program, since both get it here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture import loader
from lvm.hardware import compiler_options, sharding
from lvm.training.task import Batch, Metrics, State, TrainTask


class Step:
    """A task's update on a mesh.

    Args:
      task: what is trained.
      mesh: the devices, present or only described (`jax.experimental.topologies`).
      seed: everything random follows from it and the step.
      zero1: whether the optimizer's state is split over `data` too.
      options: of `lvm.hardware.compiler_options`; None takes the table's for the mesh's platform.

    Attributes:
      state: shapes, dtypes and shardings of the state.
      batch: the same of a batch.
      rows: int [n], the rows of a global batch that this process's devices hold, ascending.
      compiler_options: as they are passed to the compiler.
    """

    def __init__(
        self,
        task: TrainTask,
        mesh: Mesh,
        seed: int,
        zero1: bool = False,
        options: Mapping[str, compiler_options.OptionValue] | None = None,
    ):
        self.task, self.mesh = task, mesh
        if options is None:
            options = compiler_options.compiler_options(mesh.devices.flat[0].platform)
        self.compiler_options = dict(options)
        self._seed = seed
        shapes = jax.eval_shape(task.init, jax.random.key(seed))
        self._shardings = sharding.shardings(mesh, shapes, task.logical_axes)
        if zero1:
            training = shapes["training"]
            self._shardings["training"] = sharding.zero1_shardings(
                training, mesh, self._shardings["training"]
            )
        self.state = jax.tree.map(_with_sharding, shapes, self._shardings)
        batch_size = next(iter(task.batch_spec.values())).shape[0]
        rows = sharding.batch_sharding(mesh, batch_size)
        self.batch = {name: _with_sharding(x, rows) for name, x in task.batch_spec.items()}
        self.rows = loader.local_rows(rows, (batch_size,))
        self._compiled: Any = None

    def init(self) -> State:
        """A fresh state, made where it will live: no device or host ever holds all of it."""
        return self.jitted_init()()

    def jitted_init(self) -> Any:
        """What `init` calls; takes nothing."""
        return jax.jit(lambda: self.task.init(jax.random.key(self._seed)), out_shardings=self._shardings)

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's `rows` of a global batch, as arrays of which every device holds its part.

        Raises:
          ValueError: an array has another number of rows.
        """
        for name, x in batch.items():
            if len(x) != len(self.rows):
                raise ValueError(f"{name}: {len(x)} rows, this process holds {len(self.rows)}")

        return {
            name: loader.to_global(x, self.rows, self.batch[name].sharding, self.batch[name].shape)
            for name, x in batch.items()
        }

    def lower(self) -> Any:
        """The update (state, batch) → (state, metrics), donating the state, as `jax.stages.Lowered`."""

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            rng = jax.random.fold_in(jax.random.key(self._seed), state["step"])
            return self.task.update(state, batch, rng)

        return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None)).lower(
            self.state, self.batch
        )

    def compile(self) -> Any:
        """The compiled update (`jax.stages.Compiled`), compiled at the first call alone.

        Raises:
          UserError: the compiler doesn't know one of the options.
        """
        if self._compiled is None:
            try:
                self._compiled = self.lower().compile(self.compiler_options or None)
            except jax.errors.JaxRuntimeError as error:
                complaint = compiler_options.option_error(str(error), self.compiler_options)
                if complaint is None:
                    raise
                raise UserError(complaint) from error
        return self._compiled

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. The given state is used up."""
        return self.compile()(state, batch)

    def memory_bytes(self) -> int:
        """What the update needs on each device: state, batch and temporaries, what is donated counted once."""
        memory = self.compile().memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return kept + memory.temp_size_in_bytes


def _with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def enable_compilation_cache(folder: str, workdir: epath.Path) -> None:
    """Turns on JAX's persistent compilation cache and logs its hits and misses; call it before the first compile.

    Args:
      folder: local or gs://; "" takes `JAX_COMPILATION_CACHE_DIR`, or else `compilation_cache/` in `workdir`.
      workdir: the run's.
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
