"""Loading that ends, hangs or bloats its process. Imports little: each worker process imports this."""

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Mapping

import numpy as np

STEP, MOST = 32 * 2**20, 2**31  # bytes: memory grows in steps, and ends somewhere should nothing else end it


def misbehave(kind: str) -> None:
    """Does what a damaged file may do to its decoder; "" does nothing."""
    match kind:
        case "exit":
            os._exit(3)
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            with contextlib.suppress(BaseException):
                time.sleep(1000)
            time.sleep(1000)
        case "hang in C":
            ctypes.PyDLL(None).sleep(1000)  # without releasing the interpreter
        case "memory":
            held = []
            while len(held) * STEP < MOST:
                held.append(np.ones(STEP, np.uint8))
                time.sleep(0.02)
        case "no memory":
            raise MemoryError
        case "error":
            raise ValueError("a fault of the program")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A `Loader` whose result for number n is an array of n numbers, or what ended its process."""

    faults: Mapping[int, str]
    images: int = 1  # of each

    def __call__(self, item):
        misbehave(self.faults.get(item, ""))
        return np.arange(item, dtype=np.int32)

    def num_images(self, item):
        return self.images

    def failed(self, item, reason):
        return reason


@dataclasses.dataclass(frozen=True)
class DiesOnce(Numbers):
    """Ends its process the first time that number 2 is loaded by itself, as when memory is short for a moment."""

    path: str = ""

    def __call__(self, item):
        if item == 2:
            with open(self.path, "a+") as file:
                file.seek(0)
                attempts = len(file.read())
                file.write("x")
            if attempts < 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)


@dataclasses.dataclass(frozen=True)
class Process(Numbers):
    """Results are the process, whether it has imported JAX, and how readily a machine short of memory ends it."""

    def __call__(self, item):
        return os.getpid(), "jax" in sys.modules, int(pathlib.Path("/proc/self/oom_score_adj").read_text())


class Unloadable(Numbers):
    """Can't be loaded by another process."""

    def __setstate__(self, state):
        os._exit(5)
