"""Worker process of a decode pool: `python -m lvm.data.images.decode_worker DESCRIPTOR PARENT`.

A process of its own program, not of `multiprocessing`: it imports what loading needs, and neither JAX nor the command.
"""

import contextlib
import dataclasses
import gc
import math
import pathlib
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lvm.common.child_process import end_with_parent, retain_memory
from lvm.common.validation import check_positive

_IMAGES_PER_DEADLINE = 16  # a clip's, by default
_OOM_SCORE = "500"  # of 1000, added to the share of memory that a process has
_COUNT, _SIZE = struct.Struct("<I"), struct.Struct("<Q")


class Loader(Protocol):
    """Loads items in worker processes. Can be pickled."""

    def __call__(self, item: Any) -> Any:
        """Returns the result of an item, which can be pickled."""

    def num_images(self, item: Any) -> int:
        """Returns the number of images of an item, which its deadline is proportional to."""

    def failed(self, item: Any, reason: str) -> Any:
        """Returns the result of an item that ends its process, in the process that wants it."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of decoding in a worker process. Raises UserError for a value that isn't positive."""

    decode_timeout_s: float = 60.0  # for every 16 images of an item, or fewer
    decode_memory_gb: float = 4.0  # private memory of the process in 1e9 bytes

    def __post_init__(self) -> None:
        check_positive(self, "decode_timeout_s", "decode_memory_gb")

    def deadline_s(self, num_images: int) -> float:
        """Returns the seconds that an item of so many images may take."""
        return self.decode_timeout_s * max(1, math.ceil(num_images / _IMAGES_PER_DEADLINE))


def send(connection: socket.socket, message: Any) -> None:
    """Sends an object; the memory of its arrays is sent as it is, not copied into a pickle."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    connection.sendall(_COUNT.pack(len(parts)) + b"".join(_SIZE.pack(len(part)) for part in parts))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> Any:
    """Receives an object; its arrays own the memory that they were received into. Raises EOFError at the end."""
    (count,) = _COUNT.unpack(_receive_bytes(connection, _COUNT.size))
    sizes = _SIZE.iter_unpack(_receive_bytes(connection, count * _SIZE.size))
    data, *buffers = [_receive_bytes(connection, size) for (size,) in sizes]
    return pickle.loads(data, buffers=buffers)


def _receive_bytes(connection: socket.socket, size: int) -> memoryview:
    buffer = np.empty(size, np.uint8).data  # unlike a bytearray, not filled with zeros first
    received = 0
    while received < size:
        count = connection.recv_into(buffer[received:], flags=socket.MSG_WAITALL)
        if not count:
            raise EOFError
        received += count
    return buffer


def _load(loader: Loader, items: Sequence[Any], limits: Limits) -> list[Any] | Exception:
    """Returns the result of each item, or an error. The kernel ends the process at the deadline of an item.

    A signal's default action needs no interpreter: it also ends a decoder that never returns from C.
    """
    results: list[Any] = []
    try:
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, limits.deadline_s(loader.num_images(item)))
            results.append(loader(item))
        return results
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some can't be restored from their arguments
            return RuntimeError(traceback.format_exc())
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(descriptor: int, parent: int) -> None:
    """Answers messages until the other end closes: first `Limits`; a pickled `Loader`, or items for the latest one."""
    end_with_parent(parent)
    with contextlib.suppress(OSError):  # Linux only: short of memory, the machine ends this process, not its parent
        pathlib.Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    with socket.socket(fileno=descriptor) as connection:
        limits: Limits = receive(connection)
        loader: Any = None
        while True:
            try:
                message = receive(connection)
            except EOFError:
                return
            if isinstance(message, bytes):
                loader = pickle.loads(message)
                retain_memory()
                gc.collect()  # scans of imported objects took about 12 % of a worker's time
                gc.freeze()
                send(connection, None)
            else:
                send(connection, _load(loader, message, limits))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
