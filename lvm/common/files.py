"""Files that a reader sees whole or not at all, on disk and on gs://.

On disk a file is written under a temporary name, flushed and renamed. On gs:// it is one object, which is there once
all of it has arrived.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

import fsspec
from etils import epath

from lvm.common.errors import UserError

_TRIES, _WAIT, _GONE = 100, 0.1, 10  # tries, seconds between them, and so many in a row

# `epath` opens gs:// by fsspec. Other hosts write there too, so that no listing may be remembered, and what arrives is
# compared with what was sent.
fsspec.config.conf.setdefault("gcs", {}).update({"use_listings_cache": False, "consistency": "md5"})


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an object store's, such as gs://, and no file of this machine."""
    return "://" in os.fspath(path)


def put(local: epath.PathLike, path: epath.PathLike) -> None:
    """Moves a finished file of this machine to its place, where it is whole or not there."""
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.put_file(os.fspath(local), name)
        return
    flush(local)
    os.replace(local, path)
    sync_folder(epath.Path(path).parent)


def download(path: epath.PathLike, local: epath.PathLike) -> None:
    """Copies a file, remote or not, to a local one, which may stay in part if that fails."""
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.get_file(name, os.fspath(local))
    else:
        shutil.copyfile(path, local)


def move(folder: epath.PathLike, target: epath.PathLike) -> None:
    """Gives a folder another name; on gs:// its objects are copied there one by one, then deleted."""
    if is_remote(folder):
        filesystem, name = _filesystem(folder)
        filesystem.mv(name, _filesystem(target)[1], recursive=True)
    else:
        os.rename(folder, target)


def objects(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """Every object below a remote folder, by its name from there: its size, and the CRC-32C that the store keeps."""
    filesystem, name = _filesystem(folder)
    found = filesystem.find(name, detail=True, refresh=True)
    return {
        path.removeprefix(name).lstrip("/"): {"size": int(entry["size"]), "crc32c": entry.get("crc32c", "")}
        for path, entry in found.items()
    }


def _filesystem(path: epath.PathLike) -> tuple[Any, str]:
    """The connection that `epath` has too, and what the path is called there."""
    options = {"finalize_on_close": True} if os.fspath(path).startswith(("gs://", "gcs://")) else {}
    return fsspec.core.url_to_fs(os.fspath(path), **options)


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes all of a file at once. Concurrent writers of one path are safe."""
    path = epath.Path(path)
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.pipe_file(name, data)
        return
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside a local `path` for writing; it is flushed and renamed to `path` on success.

    On any error the temporary file is removed and `path` keeps its former content.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    sync_folder(path.parent)


def lock_file(path: epath.PathLike, *, shared: bool = False, wait: bool = False) -> IO[str] | None:
    """Locks a local file, made if it isn't there, for this process (`flock`).

    Returns:
      The open file, which holds the lock until it is closed; None where another process holds it and `wait` is False.
    """
    file = open(path, "a+")  # noqa: SIM115 (returned open)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


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
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder` that gets its name when all is written: it is there as a whole or not at all.

    Raises:
      UserError: it exists and isn't an empty folder.
    """
    path = epath.Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists and isn't an empty folder; choose a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(path.parent, f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    sync_folder(path.parent)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder that threads of a storage library may still be writing into, after the first of them failed.

    They make it again if they must, so it has to be gone for a while.
    """
    gone = 0
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        if gone == _GONE:
            return
        time.sleep(_WAIT)


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
