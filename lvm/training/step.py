"""The one program that a run repeats: a trainable's update, compiled for a mesh.

The loop runs it, a plan reads it: both see the same program, since both get it here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lvm import accelerators, distributed
from lvm import mesh as meshes
from lvm.console import say
from lvm.errors import UserError
from lvm.model import REMAT
from lvm.training.trainable import Batch, Metrics, State, Trainable

_GIB = 2**30
_USABLE = 0.95  # of a device's memory: allocators leave gaps, and evaluation has a program of its own


class Step:
    """A trainable's update on a mesh.

    Args:
      trainable: what is trained.
      mesh: the devices, present or only described (`jax.experimental.topologies`).
      seed: everything random follows from it and the step.
      zero1: whether the optimizer's state is split over `data` too.

    Attributes:
      state: shapes, dtypes and shardings of the state.
      batch: the same of a batch.
      rows: int [n], the rows of a global batch that this process's devices hold, ascending.
    """

    def __init__(self, trainable: Trainable, mesh: Mesh, seed: int, zero1: bool = False):
        self.trainable, self.mesh = trainable, mesh
        self._seed = seed
        shapes = jax.eval_shape(trainable.init, jax.random.key(seed))
        self._shardings = meshes.shardings(mesh, shapes, trainable.logical_axes)
        if zero1:
            training = shapes["training"]
            self._shardings["training"] = meshes.split_over_data(training, mesh, self._shardings["training"])
        self.state = jax.tree.map(_with_sharding, shapes, self._shardings)
        batch_size = next(iter(trainable.batch_spec.values())).shape[0]
        rows = meshes.batch_sharding(mesh, batch_size)
        self.batch = {name: _with_sharding(x, rows) for name, x in trainable.batch_spec.items()}
        self.rows = _own_rows(rows, batch_size)
        self._compiled: Any = None

    def init(self) -> State:
        """A fresh state, made where it will live: no device or host ever holds all of it."""
        return self.jitted_init()()

    def jitted_init(self) -> Any:
        """What `init` calls; takes nothing."""
        return jax.jit(lambda: self.trainable.init(jax.random.key(self._seed)), out_shardings=self._shardings)

    def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's `rows` of a global batch, as arrays of which every device holds its part."""

        def part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[0].indices(self.rows[-1] + 1)
            at = np.searchsorted(self.rows, first)
            return x[at : at + end - first]

        return {
            name: jax.make_array_from_callback(
                self.batch[name].shape, self.batch[name].sharding, functools.partial(part, x)
            )
            for name, x in batch.items()
        }

    def lower(self) -> Any:
        """The update (state, batch) → (state, metrics), donating the state, as `jax.stages.Lowered`."""

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            rng = jax.random.fold_in(jax.random.key(self._seed), state["step"])
            return self.trainable.update(state, batch, rng)

        return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None)).lower(
            self.state, self.batch
        )

    def compile(self) -> Any:
        """The compiled update (`jax.stages.Compiled`), compiled at the first call alone."""
        if self._compiled is None:
            self._compiled = self.lower().compile()
        return self._compiled

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. The given state is used up."""
        return self.compile()(state, batch)

    def memory_bytes(self) -> int:
        """What the update needs on each device: state, batch and temporaries, what is donated counted once."""
        memory = self.compile().memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return kept + memory.temp_size_in_bytes


def lightest_remat(make_step: Callable[[str], Step]) -> Step:
    """The step with the lightest rematerialisation whose update fits in the devices' memory, found by compiling.

    Args:
      make_step: a policy of `lvm.model.REMAT` → the step with it.

    Raises:
      UserError: not even the heaviest fits.
    """
    tried: list[str] = []
    limit = 0
    for policy in REMAT:
        step = make_step(policy)
        limit = limit or int(_USABLE * _memory_limit(step.mesh))
        try:
            needed = step.memory_bytes()
        except jax.errors.JaxRuntimeError as error:
            # TPU's compiler refuses what doesn't fit.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried.append(f"{policy} more than the compiler takes")
            continue
        if needed <= limit:
            say(f"remat {policy}: {needed / _GIB:.2f} of {limit / _GIB:.1f} GiB a device")
            return step
        tried.append(f"{policy} {needed / _GIB:.2f}")
    raise UserError(
        f"config.model.remat: nothing fits in {limit / _GIB:.1f} GiB a device (GiB needed: {', '.join(tried)}); "
        "a smaller config.batch_size, more config.objective.accumulate_steps or a larger config.mesh.fsdp would"
    )


def _memory_limit(mesh: Mesh) -> int:
    """Bytes a device; the same on every process, since all must choose the same program."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device = mine[0] if mine else mesh.devices.flat[0]
    limit = accelerators.memory_bytes(device)
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, len(mine))
    if limit is None:
        raise UserError(
            f"config.model.remat: auto needs to know the memory of {device.device_kind!r}, which isn't in "
            "lvm/accelerators.py; name a policy"
        )
    return distributed.agree(limit)


def _own_rows(rows: Any, batch_size: int) -> np.ndarray:
    own = rows.addressable_devices_indices_map((batch_size,)).values()
    numbers = {number for (part,) in own for number in range(*part.indices(batch_size))}
    return np.array(sorted(numbers), np.int64)


def _with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
