"""Pool of worker processes that may die: what kills, hangs or bloats its decoder becomes a failure, not an end."""

import collections
import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import psutil

from lvm.common.child_process import retain_memory
from lvm.common.errors import UserError
from lvm.data.images import decode_worker
from lvm.data.images.decode_worker import Limits, Loader

_PREFETCH = 4  # chunks ready ahead of their use, for each worker
_THREADS = 2  # without workers
_POLL_S = 0.1  # between looks at a worker's memory


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Items that a worker loads at once. Workers receive a loader when they don't have it from the chunk before."""

    loader: Loader
    items: Sequence[Any]
    group: int = 0  # for the caller


class _WorkerError(Exception):
    """The end of a worker process. `message` is the reason, or None if its deadline ended it."""

    def __init__(self, message: str | None):
        super().__init__(message)
        self.message = message


class _MemoryLimitError(_WorkerError):
    """A worker above its memory limit."""


class DecodePool:
    """Loads chunks in worker processes, as a context; leaving it kills them.

    When a worker dies, takes too long or too much memory, each item of its chunk is loaded by itself; the items that
    also end a new process in which nothing else was loaded have failed (`Loader.failed`). So results are a function of
    the items alone: the neighbors of a failure are loaded.

    Args:
      workers: maximum number of processes; 0 loads in threads of this process, which has no limits then.

    Raises:
      UserError: negative `workers`.
    """

    def __init__(self, workers: int, limits: Limits):
        if workers < 0:
            raise UserError(f"workers={workers} must not be negative")
        self._num_workers, self._limits = workers, limits
        self._workers: dict[int, _Worker] = {}  # by the thread that started it and watches over it
        self._lock, self._is_closed = threading.Lock(), False
        self._loader: Loader | None = None
        self._pickled = b""  # the loader

    def __enter__(self) -> "DecodePool":
        self._threads = ThreadPoolExecutor(self._num_workers or _THREADS, "decode")
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_closed = True
            for worker in self._workers.values():
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.close()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[Any]]]:
        """Yields each chunk with the results of its items, in order, while the next are loaded. Threads may call it.

        Raises:
          UserError: a worker takes more memory than the limit before it loads anything.
          RuntimeError: a worker ends before it loads anything.
          Exception: as raised by the loader, except MemoryError.
        """
        pending: collections.deque[tuple[Chunk, Future[list[Any]]]] = collections.deque()
        for chunk in chunks:
            pending.append((chunk, self._threads.submit(self._load, chunk, self._pickle(chunk.loader))))
            if len(pending) > _PREFETCH * (self._num_workers or _THREADS):
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _pickle(self, loader: Loader) -> bytes:
        """Returns the same bytes for the same loader as before, by which workers know that they have it."""
        with self._lock:
            if loader is not self._loader and self._num_workers:
                self._loader, self._pickled = loader, pickle.dumps(loader)
            return self._pickled

    def _load(self, chunk: Chunk, pickled: bytes) -> list[Any]:
        if not self._num_workers:
            retain_memory()
            return [chunk.loader(item) for item in chunk.items]
        with contextlib.suppress(_WorkerError):
            return self._try(chunk, pickled)
        if len(chunk.items) > 1:
            alone = (dataclasses.replace(chunk, items=[item]) for item in chunk.items)
            return [result for each in alone for result in self._load(each, pickled)]
        try:
            return self._try(chunk, pickled)  # in a new process
        except _WorkerError as error:
            (item,) = chunk.items
            deadline_s = self._limits.deadline_s(chunk.loader.num_images(item))
            return [chunk.loader.failed(item, error.message or f"decoding took over {deadline_s:g} s")]

    def _try(self, chunk: Chunk, pickled: bytes) -> list[Any]:
        thread = threading.get_ident()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the pool is closed")
            worker = self._workers.get(thread) or _Worker(self._limits)
            self._workers[thread] = worker
        try:
            return worker.load(pickled, chunk.items)
        except BaseException:
            with self._lock:
                del self._workers[thread]
            worker.close()
            raise


class _Worker:
    """A worker process. It is killed when the thread that started it ends, however that ends (Linux)."""

    def __init__(self, limits: Limits):
        self._limits, self._pickled = limits, b""
        self._connection, theirs = socket.socketpair()
        with theirs:
            # In a process group of its own: Ctrl-C is for the command, which ends its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", decode_worker.__name__, str(theirs.fileno()), str(os.getpid())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0,
            )  # fmt: skip
        self._memory = psutil.Process(self._process.pid)

    def load(self, pickled: bytes, items: Sequence[Any]) -> list[Any]:
        """Returns the result of each item. Raises _WorkerError, or as raised by the loader."""
        if pickled is not self._pickled:
            try:
                if not self._pickled:
                    decode_worker.send(self._connection, self._limits)
                self._ask(pickled)
                self._check_memory()
            except _MemoryLimitError as error:
                limit = f"decode_memory_gb={self._limits.decode_memory_gb:g}"
                raise UserError(f"{limit}: a worker process takes more before it decodes anything") from error
            except (_WorkerError, OSError) as error:
                raise RuntimeError(f"a worker process can't start: {error}; its own messages are above") from error
            self._pickled = pickled
        return self._ask(items)

    def kill(self) -> None:
        """Kills the process; may be called by another thread."""
        self._process.kill()

    def close(self) -> None:
        """Kills the process and frees what it holds."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _ask(self, message: Any) -> Any:
        try:
            decode_worker.send(self._connection, message)
            while not wait([self._connection], _POLL_S):
                self._check_memory()
            answer = decode_worker.receive(self._connection)
        except (EOFError, OSError) as error:
            raise _WorkerError(self._reason()) from error
        if isinstance(answer, MemoryError):
            raise _WorkerError("decoding took more memory than there is")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _check_memory(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = self._memory.memory_info()
            private = memory.rss - getattr(memory, "shared", 0)  # without files that are mapped
            if private > 1e9 * self._limits.decode_memory_gb:
                raise _MemoryLimitError(f"decoding took over {self._limits.decode_memory_gb:g} GB")

    def _reason(self) -> str | None:
        """Returns the reason why the process ended; None if its deadline ended it."""
        self._process.kill()  # without effect on one that has closed its end by ending
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return None
        return f"its decoder ended by signal {-code}" if code < 0 else f"its decoder ended with exit code {code}"
