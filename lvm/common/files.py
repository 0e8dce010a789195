"""Atomic files, locks and JSON, on local disks and object storage.

Local files are written under a temporary name, flushed and renamed; an object on gs:// appears once it is complete.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, BinaryIO, TypeVar

import fsspec
from etils import epath

from lvm.common.errors import UserError
from lvm.common.logging import warn_once

S = TypeVar("S")
T = TypeVar("T")
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of NFS, or Lustre mounted with noflock
_READS, _READ_AHEAD = 64, 512  # calls at once, and results held at most
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}  # of FAT, gcsfuse
_REMOVE_TRIES, _REMOVE_WAIT_S, _REMOVE_STABLE = 100, 0.1, 10

# `epath` opens gs:// through fsspec. Listings aren't cached, since other hosts write there too; uploads are verified.
fsspec.config.conf.setdefault("gcs", {}).update({"use_listings_cache": False, "consistency": "md5"})


def is_remote(path: epath.PathLike) -> bool:
    """True for a path on object storage, such as gs://."""
    return "://" in os.fspath(path)


def put(local: epath.PathLike, path: epath.PathLike) -> None:
    """Moves a finished local file to a local or remote path, atomically."""
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.put_file(os.fspath(local), name)
        return
    flush(local)
    os.replace(local, path)
    sync_folder(epath.Path(path).parent)


def download(path: epath.PathLike, local: epath.PathLike) -> None:
    """Copies a local or remote file to a local one, which may be incomplete after an error."""
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.get_file(name, os.fspath(local))
    else:
        shutil.copyfile(path, local)


def move(folder: epath.PathLike, target: epath.PathLike) -> None:
    """Renames a folder; on gs:// its objects are copied one by one, then deleted."""
    if is_remote(folder):
        filesystem, name = _filesystem(folder)
        filesystem.mv(name, _filesystem(target)[1], recursive=True)
    else:
        os.rename(folder, target)


def objects(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """Lists a remote folder: relative name → size in bytes and CRC-32C, as the storage service reports them."""
    filesystem, name = _filesystem(folder)
    return {
        path.removeprefix(name).lstrip("/"): {"size": int(entry["size"]), "crc32c": entry.get("crc32c", "")}
        for path, entry in filesystem.find(name, detail=True, refresh=True).items()
    }


def sizes(folder: epath.PathLike) -> dict[str, int]:
    """Sizes in bytes of the files in a local or remote folder by their names, in one listing."""
    if is_remote(folder):
        filesystem, name = _filesystem(folder)
        listed = filesystem.find(name, detail=True, refresh=True).items()
        return {path.removeprefix(name).lstrip("/"): int(properties["size"]) for path, properties in listed}
    sizes = {}
    with os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(FileNotFoundError):  # a temporary file of another process
                if item.is_file():
                    sizes[item.name] = item.stat().st_size
    return sizes


def times(folder: epath.PathLike) -> dict[str, float]:
    """Times of the last change of the files in a local or remote folder, in seconds since 1970, by their names.

    One listing. The clock is the file system's or the service's. A folder that doesn't exist has no files.
    """
    if is_remote(folder):
        filesystem, name = _filesystem(folder)
        listing = filesystem.find(name, detail=True, refresh=True)
        return {path.removeprefix(name).lstrip("/"): entry["mtime"].timestamp() for path, entry in listing.items()}
    times: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(FileNotFoundError):  # a file that another process has just removed
                if item.is_file():
                    times[item.name] = item.stat().st_mtime
    return times


def exists(path: epath.PathLike) -> bool:
    """Checks for a local or remote file or folder. Raises UserError if no package opens such paths."""
    if not is_remote(path):
        return os.path.exists(path)
    filesystem, name = _filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        return bool(filesystem.info(name))
    return False


def file_size(path: epath.PathLike) -> int | None:
    """Size of a local or remote file in bytes, None if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # `epath` looks up the owner's name, which a container's user may not have.
        return int(epath.Path(path).stat().length) if is_remote(path) else os.stat(path).st_size
    return None


def _filesystem(path: epath.PathLike) -> tuple[Any, str]:
    """fsspec's filesystem, shared with `epath`, and the path inside it. Raises UserError if its package is missing."""
    options = {"finalize_on_close": True} if os.fspath(path).startswith(("gs://", "gcs://")) else {}
    try:
        return fsspec.core.url_to_fs(os.fspath(path), **options)
    except ImportError as error:
        extra = ': pip install "lvm[s3]"' if os.fspath(path).startswith("s3://") else ""
        raise UserError(f"{path}: {error}{extra}") from error


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes a whole file. Concurrent writers of one path are safe."""
    path = epath.Path(path)
    if is_remote(path):
        filesystem, name = _filesystem(path)
        filesystem.pipe_file(name, data)
        return
    with atomic_file(path) as file:
        file.write(data)


def create(path: epath.PathLike, data: bytes) -> bool:
    """Writes a whole file unless there is one: of several processes that do so at once, one gets True."""
    path = epath.Path(path)
    try:
        if is_remote(path):
            filesystem, name = _filesystem(path)
            filesystem.pipe_file(name, data, mode="create")
            return True
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    return True


def _link(temporary: epath.Path, path: epath.Path) -> None:
    """Gives a finished file its name. Raises FileExistsError if there is one."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(path, "xb") as file:  # whoever reads at this very moment may see a part
            file.write(temporary.read_bytes())


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Yields a temporary file, renamed to the local `path` on success; on an error `path` keeps its former content."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"  # threads and hosts may share a process id
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


def lock_file(path: epath.PathLike, *, wait: bool = False) -> IO[str] | None:
    """Locks a local file with `flock`, creating it if needed; on a file system without locks, warns instead.

    Returns:
      The open file, which holds the lock until it is closed; None if another process holds it and `wait` is False.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (returned open)
    try:
        is_ours = _flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    if is_ours is None:
        folder = os.path.dirname(path) or "."
        warn_once(f"{folder}: its file system has no locks; make sure that no two runs write there at a time")
    elif not is_ours:
        file.close()
        return None
    return file


def is_locked(path: epath.PathLike) -> bool | None:
    """Checks whether another process holds a local file's lock; None on a file system without locks."""
    with open(path, encoding="utf-8") as file:
        is_ours = _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return None if is_ours is None else not is_ours


def has_locks(folder: epath.PathLike) -> bool:
    """Checks whether the file system of a local folder that can be written has file locks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is not None


def _flock(file: IO[Any], operation: int) -> bool | None:
    """Locks an open file; False if another process holds the lock, None on a file system without locks."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def flush(path: epath.PathLike) -> None:
    """Flushes a file's content to disk (fsync)."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: epath.PathLike) -> None:
    """Flushes a folder's entries to disk (fsync), so that renames survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys; equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `json_bytes`, atomically."""
    write_atomically(path, json_bytes(value))


def read_bytes(path: epath.PathLike) -> bytes:
    """Reads a whole file, in one request if it is remote."""
    if is_remote(path):
        filesystem, name = _filesystem(path)
        return filesystem.cat_file(name)
    return pathlib.Path(path).read_bytes()


def read_json(path: epath.PathLike) -> Any:
    """Reads JSON. Raises UserError where it is malformed."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def read_side_file(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object that can be made again; {} where there is none, or where a power cut left something else."""
    try:
        value = read_json(path)
    except (FileNotFoundError, UserError):
        return {}
    return value if isinstance(value, dict) else {}


def read_side_files(paths: Sequence[epath.PathLike]) -> Iterator[dict[str, Any]]:
    """Yields `read_side_file` of each path."""
    return map_concurrently(read_side_file, paths)


def map_concurrently(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Yields a function of each item in order; many calls wait for disks or object storage at once."""
    with concurrent.futures.ThreadPoolExecutor(_READS) as pool:
        for start in range(0, len(items), _READ_AHEAD):
            yield from pool.map(function, items[start : start + _READ_AHEAD])


def as_json(value: Any) -> Any:
    """Round-trips a value through JSON: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, renamed to `folder` on success and removed on an error.

    Raises:
      UserError: `folder` exists and isn't an empty folder.
    """
    path = epath.Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists and isn't an empty folder; choose a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(path.parent, f".{path.name}.{uuid.uuid4().hex}.tmp")  # hosts may share a process id
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    sync_folder(path.parent)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder that threads of a storage library may still write into, recreating it, after one of them failed.

    Retries until the folder has stayed absent for a while.
    """
    absent = 0
    for _ in range(_REMOVE_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == _REMOVE_STABLE:
            return
        time.sleep(_REMOVE_WAIT_S)


@contextlib.contextmanager
def clear_disk_errors(folder: epath.PathLike) -> Iterator[None]:
    """Turns storage libraries' own errors about a full or read-only disk back into `OSError`."""
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
