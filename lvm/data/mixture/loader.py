"""Prefetching of batches with Grain, in threads or worker processes."""

import errno
import functools
import gc
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Sharding
from jaxtyping import Int, Shaped

from lvm.common.child_process import retain_memory
from lvm.common.errors import UserError

_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)
_SHARED_MEMORY = "/dev/shm"
PREFETCH = 4  # batches ready ahead of their use, for each worker


def prefetch_batches(
    read: Callable[[int], Mapping[str, np.ndarray]], start: int, stop: int, workers: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields `read(start)`, `read(start + 1)` … up to `stop`, in order, with some read ahead.

    A resume needs only its first step: the state of Grain's iterator is never saved.

    Args:
      read: a pure function of the step.
      start, stop: the steps [start, stop).
      workers: processes that read; 0 reads in threads of this one. Each worker imports the main module, which must
        guard its entry point (`if __name__ == "__main__":`), and unpickles `read`, which may hold stores, but no
        devices or open files.

    Raises:
      UserError: negative `workers`, or as raised by `read`.
    """
    if workers < 0:
        raise UserError(f"workers={workers} must not be negative")
    steps = grain.MapDataset.range(start, stop).map(functools.partial(_read_compressed, read) if workers else read)
    if not workers:
        retain_memory()
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH))
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its absl debugging flags, which notebooks and tests don't parse
    _start_quiet_tracker()
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCH)
    iterator = iter(steps.to_iter_dataset(one_thread).mp_prefetch(options))
    try:
        for compressed in iterator:
            # Shared memory is freed with its last view, and JAX may hold on to an array for longer: copy it.
            yield decompress(compressed)
            del compressed
    except (OSError, RuntimeError) as error:
        # Without a free page a worker dies by SIGBUS, and without one for a semaphore, which is no file, none starts.
        is_semaphore = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        if not is_semaphore and f"exit code -{int(signal.SIGBUS)}" not in str(error):
            raise
        free = shutil.disk_usage(_SHARED_MEMORY).free
        raise UserError(
            f"{_SHARED_MEMORY}: too small for the batches of {workers} worker processes ({free:,} bytes free); enlarge "
            "it (docker run --shm-size), or read without workers (config.loop.input_workers=0)"
        ) from error
    finally:
        iterator.close()


def compress(batch: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Losslessly compresses a batch, since shared memory costs by the page.

    Broadcast rows are stored once, booleans as bits, integers in as few bytes as their values need.
    """
    return {name: _compress(np.asarray(x)) for name, x in batch.items()}


def decompress(compressed: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Inverse of `compress`, into newly allocated memory."""
    return {name: _decompress(**x) for name, x in compressed.items()}


def _compress(x: np.ndarray) -> dict[str, Any]:
    rows = x[:1] if x.ndim and x.strides[0] == 0 else x
    data = rows
    if x.dtype == bool:
        data = np.packbits(rows)
    elif x.dtype.kind in "iu" and x.dtype.itemsize > 1 and rows.size:
        low, high = rows.min(), rows.max()
        fitting = (t for t in _INTEGERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        data = rows.astype(next(fitting, x.dtype))
    return {"data": data, "rows": rows.shape, "shape": x.shape, "dtype": x.dtype}


def _decompress(data: np.ndarray, rows: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        data = np.unpackbits(data, count=math.prod(rows)).view(bool).reshape(rows)
    return np.broadcast_to(data, shape).astype(dtype, order="C")


def _read_compressed(read: Callable[[int], Mapping[str, np.ndarray]], step: int) -> dict[str, dict[str, Any]]:
    _initialize_worker()
    return compress(read(step))


@functools.cache
def _initialize_worker() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent doesn't end its workers
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    # Freeze imported objects: GC scans took about 12 % of a worker's time.
    gc.collect()
    gc.freeze()
    retain_memory()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _start_quiet_tracker() -> None:
    """Starts Python's shared-memory tracker with its warnings off.

    Two processes report each segment to it; it miscounts and reports freed segments as leaked.
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


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """The rows of a global array that this process's devices hold, ascending, each once.

    Several processes hold the same row if an axis that doesn't split the batch spans them.
    """
    indices = sharding.addressable_devices_indices_map(shape).values()
    bounds = [(slice(None) if index is None else index[0]).indices(shape[0]) for index in indices]
    return np.unique(np.concatenate([np.arange(*each) for each in bounds]))


def to_global(
    local: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " n"], sharding: Sharding, shape: tuple[int, ...]
) -> jax.Array:
    """Assembles a global array of `shape` from this process's `rows` of it (`local_rows`)."""

    def shard(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        begin = int(np.searchsorted(rows, first))
        return local[begin : begin + last - first][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, shard)
