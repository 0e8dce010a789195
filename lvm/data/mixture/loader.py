"""Batches ahead of their use, by Grain: read in threads, or in processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
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

from lvm.common.errors import UserError

# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>: all threads share one heap, which keeps what it has.
_MALLOC = {-8: 1, -3: 2**28, -1: 2**28}
_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)
PREFETCH = 4  # batches that are ready before they are asked for (by each worker)


def prefetch_batches(
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
    steps = grain.MapDataset.range(start, stop).map(_InWorker(read) if workers else read)
    if not workers:
        _keep_memory()
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH))
        return
    if not flags.FLAGS.is_parsed():
        # Grain asks absl for debugging flags of its own before it starts a worker; in a notebook or a test
        # nobody has parsed any, and their defaults are meant.
        flags.FLAGS.mark_as_parsed()
    _start_quiet_tracker()
    # A worker reads in one thread: there are more workers where more is wanted.
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCH)
    iterator = iter(steps.to_iter_dataset(one_thread).mp_prefetch(options))
    try:
        for packed in iterator:
            # Workers hand over memory that all processes share and that goes when the last view does. JAX may
            # keep what it is given for longer than it shows, so it gets a copy.
            yield decompress(packed)
            del packed
    finally:
        iterator.close()


def compress(batch: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """A batch in fewer bytes without loss: what processes share costs by the page.

    Rows that are one row are kept once, truths as bits, integers in as few bytes as they need.
    """
    return {name: _pack(np.asarray(x)) for name, x in batch.items()}


def decompress(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The batch that `compress` was given, in memory of its own."""
    return {name: _unpack(**x) for name, x in packed.items()}


def _pack(x: np.ndarray) -> dict[str, Any]:
    rows = x[:1] if x.ndim and x.strides[0] == 0 else x
    kept = rows
    if x.dtype == bool:
        kept = np.packbits(rows)
    elif x.dtype.kind in "iu" and x.dtype.itemsize > 1 and rows.size:
        low, high = rows.min(), rows.max()
        fitting = (k for k in _INTEGERS if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        kept = rows.astype(next(fitting, x.dtype))
    return {"kept": kept, "rows": rows.shape, "shape": x.shape, "dtype": x.dtype}


def _unpack(kept: np.ndarray, rows: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        kept = np.unpackbits(kept, count=math.prod(rows)).view(bool).reshape(rows)
    return np.broadcast_to(kept, shape).astype(dtype, order="C")


class _InWorker:
    """What a worker reads, packed."""

    _begun = False

    def __init__(self, read: Callable[[int], Mapping[str, np.ndarray]]):
        self._read = read

    def __call__(self, step: int) -> dict[str, dict[str, Any]]:
        if not _InWorker._begun:
            _InWorker._begun = True
            _begin_worker()
        return compress(self._read(step))


def _begin_worker() -> None:
    """Once in each worker: it ends with the process that started it, and its memory is made for batches."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # nobody else would end it where that one was killed
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Nothing that was imported is ever garbage; looking through it again and again took an eighth of the time.
    gc.collect()
    gc.freeze()
    _keep_memory()


@functools.cache
def _keep_memory() -> None:
    """Large arrays come and go with every batch. Given back to the system, each would come as new pages."""
    with contextlib.suppress(AttributeError, OSError):  # glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


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


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of a global array that the devices of this process hold, int64 [n], ascending, each once.

    Where an axis that doesn't split the batch spans processes, several of them hold the same row.
    """
    held = sharding.addressable_devices_indices_map(shape).values()
    bounds = [(slice(None) if index is None else index[0]).indices(shape[0]) for index in held]
    return np.unique(np.concatenate([np.arange(*each) for each in bounds]))


def to_global(local: np.ndarray, rows: np.ndarray, sharding: Sharding, shape: tuple[int, ...]) -> jax.Array:
    """A global array of `shape` from `rows`, [n, ...], of it: those of `local_rows`."""

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        begin = int(np.searchsorted(rows, first))
        return local[begin : begin + last - first][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)
