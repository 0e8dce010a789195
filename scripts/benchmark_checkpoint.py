"""What checkpoints cost: `python -m scripts.benchmark_checkpoint --size=100m --folder=DIR`.

Saves a training state as the loop does, while steps go on; prints how long a step waits for it, how long the writing
in the background takes, how long restoring and comparing checksums take, and the share of training that saving costs.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import flags

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.model.transformer import SIZES
from lvm.training.checkpoint import Checkpoints
from lvm.training.task import State
from scripts.benchmark_train import VOCABULARY, make_step

_SIZE = flags.DEFINE_string("size", "100m", "a size of lvm.model.transformer.SIZES")
_FOLDER = flags.DEFINE_string("folder", "", "where to save; a temporary folder if empty")
_EVERY = flags.DEFINE_integer("every", 1000, "steps from one checkpoint to the next", lower_bound=1)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 1.0, "seconds a step, for the share", lower_bound=1e-6)
_REPEATS = flags.DEFINE_integer("repeats", 3, "checkpoints that are saved", lower_bound=1)


def main() -> None:
    """The command."""
    if _SIZE.value not in SIZES:
        raise UserError(f"--size: {_SIZE.value!r} is not one of {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory(dir=_FOLDER.value or None) as folder:
        measure(pathlib.Path(folder))


def measure(folder: pathlib.Path) -> None:
    """Prints the table."""
    config = dataclasses.replace(SIZES[_SIZE.value], vocabulary_size=VOCABULARY, context=128)
    step = make_step(config, batch_size=1)
    state = jax.block_until_ready(_trained(step.init()))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = []
    _update(_trained(step.init()))  # compiles
    checkpoints = Checkpoints(folder, keep=1)
    for number in range(1, _REPEATS.value + 1):
        state, usual = _update(state)
        began = time.perf_counter()
        checkpoints.save(state, number, {})
        # Where arrays are not copied at once, the update that wants their memory waits for it or copies them.
        state, _ = _update(state)
        waited = time.perf_counter() - began - usual
        checkpoints.wait()
        written = time.perf_counter() - began
        began = time.perf_counter()
        checkpoints.latest_intact_step()
        compared = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(number, step.state))
        rows.append((waited, written, compared, time.perf_counter() - began))
    checkpoints.close()
    log_info(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {os.cpu_count()} cores")
    log_info(f"{_SIZE.value}: a state of {size / 1e9:.2f} GB, medians of {_REPEATS.value}")
    names = ["a step waits", "written, with checksums", "checksums compared", "restored"]
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        middle = sorted(values)[len(values) // 2]
        log_info(f"{name:<24} {middle:8.2f} s {size / 1e9 / middle:8.2f} GB/s")
    share = sorted(row[0] for row in rows)[len(rows) // 2] / (_EVERY.value * _STEP_SECONDS.value)
    log_info(f"every {_EVERY.value} steps of {_STEP_SECONDS.value} s, waiting is {share:.3%} of the time")


def _trained(state: State) -> State:
    """The state with moments as a run has them: no zeros, which would be compressed away."""
    leaves, tree = jax.tree.flatten(state)
    noise = [
        jax.random.normal(jax.random.key(number), leaf.shape) if leaf.dtype == jnp.float32 else leaf
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, noise)


def _update(state: State) -> tuple[State, float]:
    """Something that uses the state up, as a step does, and its seconds."""
    began = time.perf_counter()
    state = jax.block_until_ready(_double(state))
    return state, time.perf_counter() - began


_double = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)


if __name__ == "__main__":
    cli.run(main)
