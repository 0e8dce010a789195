"""Benchmark of checkpoints: blocking time of a save, background write, checksum verification and restore.

    python -m scripts.benchmark_checkpoint --size=100m --folder=DIR             persistent checkpoints
    python -m scripts.benchmark_checkpoint --local --layers=4 --every=50        local ones, a state of 0.3 GB

Saves a training state as the loop does while steps continue, and prints the share of training time that saving costs.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.model.transformer import SIZES
from lvm.training.checkpoint import Checkpoints
from lvm.training.local_checkpoint import LocalCheckpointConfig, LocalCheckpoints
from lvm.training.task import State
from scripts.benchmark_train import VOCABULARY, make_step


def _run(args: cli.Args) -> None:
    if args.size not in SIZES:
        raise UserError(f"--size: {args.size!r} is not one of {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        measure(args, pathlib.Path(folder))


def measure(args: cli.Args, folder: pathlib.Path) -> None:
    """Prints the table."""
    config = dataclasses.replace(SIZES[args.size], vocabulary_size=VOCABULARY, context=128)
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    step = make_step(config, batch_size=1)
    state = jax.block_until_ready(_trained(step.init()))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = []
    _update(_trained(step.init()))  # compiles
    checkpoints: Checkpoints | LocalCheckpoints
    verify: Callable[[], int | None]
    restore: Callable[[int], Any]
    if args.local:
        checkpoints = LocalCheckpoints(LocalCheckpointConfig(str(folder / "local")), folder, step.state)
        verify = functools.partial(checkpoints.latest_intact_step, args.repeats + 1)
        restore = checkpoints.restore
    else:
        checkpoints = Checkpoints(folder, keep=1)
        verify, restore = checkpoints.latest_intact_step, functools.partial(checkpoints.restore, abstract=step.state)
    for index in range(1, args.repeats + 1):
        state, update_s = _update(state)
        start = time.perf_counter()
        checkpoints.save(state, index, {})
        # Where the save has not copied the arrays yet, the update that donates them waits or copies.
        state, _ = _update(state)
        blocked_s = time.perf_counter() - start - update_s
        checkpoints.wait()
        written_s = time.perf_counter() - start
        start = time.perf_counter()
        verify()
        verified_s = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(restore(index))
        rows.append((blocked_s, written_s, verified_s, time.perf_counter() - start))
    if isinstance(checkpoints, Checkpoints):
        checkpoints.close()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {os.cpu_count()} cores")
    kind = "local" if args.local else "persistent"
    print(f"{args.size}, {config.num_layers} layers, {kind}: a state of {size / 1e9:.2f} GB, medians of {args.repeats}")
    names = ["a step waits", "written, with checksums", "checksums compared", "restored"]
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        middle = sorted(values)[len(values) // 2]
        print(f"{name:<24} {middle:8.2f} s {size / 1e9 / middle:8.2f} GB/s")
    share = sorted(row[0] for row in rows)[len(rows) // 2] / (args.every * args.step_seconds)
    print(f"every {args.every} steps of {args.step_seconds} s, waiting is {share:.3%} of the time")


def _trained(state: State) -> State:
    """Fills the state with random values, as during a run: zeros would be compressed away."""
    leaves, tree = jax.tree.flatten(state)
    noise = [
        jax.random.normal(jax.random.key(index), leaf.shape) if leaf.dtype == jnp.float32 else leaf
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, noise)


def _update(state: State) -> tuple[State, float]:
    """Donates the state to an update, as a step does; returns the new one and the seconds."""
    start = time.perf_counter()
    state = jax.block_until_ready(_double(state))
    return state, time.perf_counter() - start


_double = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("size", "100m", "model size, of lvm.model.transformer.SIZES")
    flags.string("folder", "", "folder for the checkpoints (default: a temporary one)")
    flags.integer("layers", 0, "layers of the model (default: those of its size)", lower_bound=0)
    flags.boolean("local", False, "measure local checkpoints instead of persistent ones")
    flags.integer("every", 1000, "steps between checkpoints, for the share", lower_bound=1)
    flags.float("step_seconds", 1.0, "seconds per step, for the share", lower_bound=1e-6)
    flags.integer("repeats", 3, "number of checkpoints", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
