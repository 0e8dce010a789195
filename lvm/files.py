"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from lvm.errors import UserError


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes to a temporary name beside `path`, flushes, renames. Concurrent writers of one path are safe."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    sync_folder(path.parent)


def flush(path: epath.PathLike) -> None:
    """Makes what was written to a file survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: epath.PathLike) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Indented JSON with sorted keys, atomically: equal values are equal bytes."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """What `write_json` wrote.

    Raises:
      UserError: not JSON.
    """
    try:
        return json.loads(epath.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def sha256(path: epath.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def clear_disk_errors(folder: epath.PathLike) -> Iterator[None]:
    """Storage libraries wrap a full or read-only disk in errors of their own; gives back an `OSError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
        raise
    except Exception as error:
        for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), os.fspath(folder)) from error
        raise
