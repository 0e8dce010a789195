"""Arrays on disk."""

import errno
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from numpy.typing import DTypeLike

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def create_arrays(
    folder: epath.PathLike, arrays: Mapping[str, tuple[Sequence[int], DTypeLike]]
) -> dict[str, np.ndarray]:
    """Creates NAME.npy of zeros in a local folder for each name's shape and dtype; returns them mapped for writing.

    Their space is allocated: of a sparse file, a write beyond the end of the disk kills the process (SIGBUS).

    Raises:
      OSError: the disk is full; says how many bytes all arrays need.
    """
    created: dict[str, np.ndarray] = {}
    try:
        for name, (shape, dtype) in arrays.items():
            path = pathlib.Path(folder, f"{name}.npy")
            created[name] = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), tuple(shape))
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
        message = f"{os.strerror(error.errno)}: {needed:,} bytes are needed for {', '.join(arrays)}"
        raise OSError(error.errno, message, os.fspath(folder)) from error
    return created
