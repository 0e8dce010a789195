"""Checkpoint checksums. Orbax does not detect corrupted bytes on restore.

On disk every byte is read back. On gs:// the store keeps each object's CRC-32C and checks it on every read, so the
listing is compared. A checkpoint without checksums, such as a copy, may be a part of one: its arrays are read back.
"""

import concurrent.futures
import errno
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import google_crc32c
import tensorstore
from etils import epath

from lvm.common import files
from lvm.common.logging import log_warning

T = TypeVar("T")
_CHUNK_BYTES = 2**24
_THREADS = 4
_DAMAGE = re.compile("NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|Error decoding")  # other errors of TensorStore are of the disk
_RETRY_DELAYS_S = (1.0, 4.0, 16.0)


def write(folder: epath.Path, record: epath.Path) -> None:
    """Writes size and CRC-32C of every file below `folder` to the JSON file `record`."""
    if files.is_remote(folder):
        entries = files.objects(folder)
    else:
        names = sorted(str((root / name).relative_to(folder)) for root, _, names in folder.walk() for name in names)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            entries = dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))
    record.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(record, entries)


def find_damage(folder: epath.Path, record: epath.Path, prefix: str = "") -> str | None:
    """Compares the files of `folder` whose relative path starts with `prefix` with the checksums in `record`.

    Without a record that can be read, reads their arrays.

    Returns:
      The first damaged file and what is wrong with it, in one line; None if all files are intact.

    Raises:
      OSError: a file can't be read, even after retries: it may or may not be intact.
    """
    if not (entries := files.read_side_file(record)):
        log_warning(f"{folder}: has no checksums in {record}; its arrays are read instead")
        items = [item for item in ("params/", "training/") if item.startswith(prefix)]
        return next(filter(None, (_find_unreadable(folder / item) for item in items)), None)
    expected = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    objects = retry_io(lambda: files.objects(folder)) if files.is_remote(folder) else None

    def check(name: str) -> str | None:
        path = folder / name
        if name not in objects if objects is not None else not path.exists():
            return f"{path}: missing"
        size = files.file_size(path) if objects is None else objects[name]["size"]
        if size != expected[name]["size"]:
            return f"{path}: {size} bytes, expected {expected[name]['size']}"
        actual = _checksum(path) if objects is None else objects[name]
        return None if actual == expected[name] else f"{path}: checksum mismatch"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(lambda name: retry_io(lambda: check(name)), expected)), None)


def ocdbt_spec(folder: epath.Path) -> dict[str, Any]:
    """The database of arrays in a folder of Orbax, for TensorStore."""
    base = os.fspath(folder) if files.is_remote(folder) else f"file://{os.fspath(folder.resolve())}"
    return {"driver": "ocdbt", "base": base}


def _find_unreadable(folder: epath.Path) -> str | None:
    """Reads every array in a folder of Orbax; returns the first problem in one line, None if there is none."""

    def read(key: bytes) -> None:
        store.read(key).result()

    try:
        store = tensorstore.KvStore.open(ocdbt_spec(folder)).result()
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(read, store.list().result()):
                pass
    except ValueError as error:
        if not _DAMAGE.match(str(error)):
            raise OSError(errno.EIO, " ".join(str(error).split()), os.fspath(folder)) from error
        return f"{folder}: {' '.join(str(error).split())[:300]}"
    return None


def _checksum(path: epath.Path) -> dict[str, Any]:
    checksum, size = google_crc32c.Checksum(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
    return {"size": size, "crc32c": checksum.hexdigest().decode()}


def retry_io(function: Callable[[], T]) -> T:
    """Returns `function()`; retries a few times, with growing delays, on OSError."""
    for delay in _RETRY_DELAYS_S:
        try:
            return function()
        except OSError as error:
            log_warning(f"{error}; retrying in {delay:.0f} s")
            time.sleep(delay)
    return function()
