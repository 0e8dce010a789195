"""Batches ahead of their use, by Grain: read in threads, or in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Sharding

from lvm.errors import UserError

AHEAD = 4  # batches that are ready before they are asked for (by each worker)


def batches(
    read: Callable[[int], Mapping[str, np.ndarray]], start: int, stop: int, workers: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """`read(start)`, `read(start + 1)` … up to `stop`, in this order, some of them read ahead.

    A resume begins at a step and needs nothing else: the state of Grain's iterator is never kept.

    Args:
      read: a pure function of the step.
      start, stop: the steps [start, stop).
      workers: processes that read; 0 reads in threads of this one. Every worker starts a Python of its own, so
        the program that is running must be importable without running again (`if __name__ == "__main__":`),
        and `read` is sent to it: it may hold stores, but no devices and no open files.

    Raises:
      UserError: what `read` raises.
    """
    if workers < 0:
        raise UserError(f"workers: {workers} is negative")
    steps = grain.MapDataset.range(start, stop).map(_WithParent(read) if workers else read)
    if not workers:
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=AHEAD))
        return
    if not flags.FLAGS.is_parsed():
        # Grain asks absl for debugging flags of its own before it starts a worker; in a notebook or a test
        # nobody has parsed any, and their defaults are meant.
        flags.FLAGS.mark_as_parsed()
    _start_quiet_tracker()
    # A worker reads in one thread: there are more workers where more is wanted.
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    iterator = iter(steps.to_iter_dataset(one_thread).mp_prefetch(options))
    try:
        for batch in iterator:
            # Workers hand over memory that all processes share and that goes when the last view does. JAX may
            # keep what it is given for longer than it shows, so it gets a copy.
            yield {name: np.array(x) for name, x in batch.items()}
            del batch
    finally:
        iterator.close()


class _WithParent:
    """What a worker reads, by a process that ends when the one that started it was killed: nobody else would end it."""

    _watched = False

    def __init__(self, read: Callable[[int], Mapping[str, np.ndarray]]):
        self._read = read

    def __call__(self, step: int) -> Mapping[str, np.ndarray]:
        parent = multiprocessing.parent_process()
        if parent is not None and not _WithParent._watched:
            _WithParent._watched = True
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        return self._read(step)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _start_quiet_tracker() -> None:
    """Starts the process that Python has for shared memory so that it doesn't warn at the end of a program.

    It is told of each piece by two processes, miscounts, and reports pieces as leaked that are gone.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def rows_of_process(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of a global array that the devices of this process hold, int64 [n], ascending, each once.

    Where an axis that doesn't split the batch spans processes, several of them hold the same row.
    """
    held = sharding.addressable_devices_indices_map(shape).values()
    bounds = [(slice(None) if index is None else index[0]).indices(shape[0]) for index in held]
    return np.unique(np.concatenate([np.arange(*each) for each in bounds]))


def to_global(local: np.ndarray, rows: np.ndarray, sharding: Sharding, shape: tuple[int, ...]) -> jax.Array:
    """A global array of `shape` from `rows`, [n, ...], of it: those of `rows_of_process`."""

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        begin = int(np.searchsorted(rows, first))
        return local[begin : begin + last - first][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)
