"""Settings of a process that works for another one."""

import contextlib
import ctypes
import functools
import os
import signal
import sys

from lvm.common.errors import EXIT_ERROR

_SET_PARENT_DEATH_SIGNAL = 1  # of <linux/prctl.h>
# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>: one heap for all threads, which keeps its memory.
_MALLOC = {-8: 1, -3: 2**28, -1: 2**28}


def end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the thread that started it ends, in the process `parent` (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the signal was asked for
            os._exit(EXIT_ERROR)


@functools.cache
def retain_memory() -> None:
    """Keeps freed memory in the heap: returned to the system, each batch's arrays would fault in new pages."""
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)
