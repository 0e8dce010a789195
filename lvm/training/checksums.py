"""What stands beside a checkpoint so that a damaged one is known: Orbax restores a flipped byte without a word.

On disk all bytes are read back. On gs:// the store itself keeps a checksum of each object and answers for its bytes:
there the listing is compared.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, TypeVar

import google_crc32c
from etils import epath

from lvm.common import files
from lvm.common.logging import log_info

T = TypeVar("T")
_CHUNK = 2**24  # bytes read at a time
_THREADS = 4
_WAITS = (1.0, 4.0, 16.0)  # seconds before an input error is tried again


def write(folder: epath.Path, record: epath.Path) -> None:
    """Writes size and CRC-32C of every file below `folder` into `record`."""
    if files.is_remote(folder):
        found = files.objects(folder)
    else:
        names = sorted(
            str((root / name).relative_to(folder)) for root, _, names in folder.walk() for name in names
        )
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))
    record.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(record, found)


def problem(folder: epath.Path, record: epath.Path, under: str = "") -> str | None:
    """What is wrong with the first damaged file of `folder`, as one line; None where all are as they were written.

    Args:
      folder: of the checkpoint.
      record: what `write` made of it.
      under: only files whose names begin so.

    Raises:
      OSError: a file can't be read, also after waiting: that says nothing of what was written.
    """
    wanted = {name: entry for name, entry in files.read_json(record).items() if name.startswith(under)}

    there = retry_io(lambda: files.objects(folder)) if files.is_remote(folder) else None

    def check(name: str) -> str | None:
        path = folder / name
        if name not in there if there is not None else not path.exists():
            return f"{path}: missing"
        size = path.stat().length if there is None else there[name]["size"]
        if size != wanted[name]["size"]:
            return f"{path}: {size} bytes, {wanted[name]['size']} were written"
        found = _describe(path) if there is None else there[name]
        return None if found == wanted[name] else f"{path}: its checksum is not that of what was written"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(lambda name: retry_io(lambda: check(name)), wanted)), None)


def _describe(path: epath.Path) -> dict[str, Any]:
    checksum, size = google_crc32c.Checksum(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
            size += len(chunk)
    return {"size": size, "crc32c": checksum.hexdigest().decode()}


def retry_io(function: Callable[[], T]) -> T:
    """Calls `function`; tries an input or output error again after a while, a few times."""
    for wait in _WAITS:
        try:
            return function()
        except OSError as error:
            log_info(f"{error}; trying again in {wait:.0f} s")
            time.sleep(wait)
    return function()
