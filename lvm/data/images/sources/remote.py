"""Access to object storage through fsspec: listings, retries, verified reads, and folders of local copies."""

import base64
import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
import fsspec.utils
import google_crc32c

from lvm.common import files
from lvm.common.errors import UnavailableError, UserError
from lvm.data.images.sources.image_file import UnreadableError
from lvm.data.images.sources.listing import is_visible, natural_key

T = TypeVar("T")

_RETRY_DELAYS_S = (0.2, 1.0, 5.0, 20.0)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_WILDCARD = re.compile(r"[*?\[]")
_COPIES = "lvm-source-"  # prefix of the folders of copies
_LOCK = ".owner"  # in a folder of copies, locked while its process runs


class Object(NamedTuple):
    """An object as its storage lists it."""

    size: int  # in bytes; -1 if the storage doesn't tell, as web servers
    checksum: str  # or version, as the storage has it; "" if none
    crc32c: str = ""  # in base64, of gs://


Objects = dict[str, Object]  # by path below what was listed, "" for itself

_listings: ContextVar[dict[str, Objects] | None] = ContextVar("listings", default=None)


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path inside it.

    Raises:
      UserError: an unknown protocol, or no package.
      UnavailableError: a protocol that connects at once, without an answer.
    """
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = _PACKAGES.get(protocol, getattr(error, "name", None) or "its package")
        extra = ': pip install "lvm[s3]"' if package == "s3fs" else ""
        raise UserError(f"{url}: reading {protocol}:// needs {package}, which is not installed{extra}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; expected a local path, gs://…, s3://… or another URL of fsspec") from error
    except OSError as error:
        raise UnavailableError(f"{url}: {_one_line(error)}") from error


def retry(function: Callable[[], T], own_errors: tuple[type[Exception], ...] = ()) -> T:
    """Returns `function()`; retries on errors of the network and the service.

    Args:
      function: reads from the storage.
      own_errors: its errors that another try doesn't change, such as those of a file's format; raised as they are.

    Raises:
      UnreadableError: there is no such object.
      UnavailableError: the storage does not answer, or refuses, as when credentials expire: no reason to go on without
        the file.
      UserError: the disk of temporary files is full.
    """
    for delay_s in (*_RETRY_DELAYS_S, None):
        try:
            return function()
        except own_errors:
            raise
        except FileNotFoundError:
            raise UnreadableError("no such object") from None
        except PermissionError as error:
            raise UnavailableError(_one_line(error)) from error
        except Exception as error:  # each protocol's library has its own, of aiohttp or botocore
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                folder = tempfile.gettempdir()
                raise UserError(f"{folder}: {error.strerror}; set TMPDIR to a disk with space for copies") from error
            if delay_s is None:
                raise UnavailableError(_one_line(error)) from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


def read_object(url: str, listed: Object | None) -> bytes:
    """Reads an object into memory; errors as for `retry`, an object that differs from its listing is read again."""
    filesystem, path = filesystem_of(url)

    def read() -> bytes:
        data = filesystem.cat_file(path)
        _check(url, listed, len(data), lambda: google_crc32c.value(data))
        return data

    return retry(read)


def copy_object(url: str, path: pathlib.Path, listed: Object | None) -> None:
    """Copies an object to a local file, which may be incomplete after an error; otherwise as `read_object`."""
    filesystem, source = filesystem_of(url)

    def copy() -> None:
        filesystem.get_file(source, str(path))
        _check(url, listed, path.stat().st_size, lambda: _file_crc32c(path))

    retry(copy)


def _check(url: str, listed: Object | None, size: int, crc32c: Callable[[], int]) -> None:
    """Raises OSError if content that was read differs from the listing."""
    if listed is None:
        return
    if listed.size >= 0 and size != listed.size:
        raise OSError(f"{url}: {size} bytes were read, and {listed.size} were listed")
    if listed.crc32c and crc32c() != int.from_bytes(base64.b64decode(listed.crc32c), "big"):
        raise OSError(f"{url}: its content differs from its checksum of when it was listed")


def _file_crc32c(path: pathlib.Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            value = google_crc32c.extend(value, data)
    return value


@contextlib.contextmanager
def listing_once() -> Iterator[None]:
    """A context in which each URL is listed once: the names that tell a source's kind are also those of its files."""
    token = _listings.set({})
    try:
        yield
    finally:
        _listings.reset(token)


def list_objects(url: str) -> Objects:
    """Lists the objects below a URL by one call.

    Raises:
      UserError: no permission, or as `filesystem_of`.
      UnavailableError: the storage does not answer.
    """
    known = _listings.get()
    if known is not None and url in known:
        return known[url]
    filesystem, root = filesystem_of(url)

    def find() -> dict[str, Any]:
        try:
            return filesystem.find(root, detail=True)
        except FileNotFoundError:
            return {}
        except PermissionError as error:
            raise UserError(f"{url}: can't be listed: {_one_line(error)}") from error

    try:
        entries = retry(find, (UserError,))
    except UnavailableError as error:
        raise UnavailableError(f"{url}: can't be listed: {error}") from error
    root = root.strip("/")
    objects = {
        path.strip("/")[len(root) :].lstrip("/"): _as_object(info)
        for path, info in entries.items()
        if info.get("type", "file") == "file" and not path.endswith("/")  # markers of empty folders
    }
    if known is not None:
        known[url] = objects
    return objects


def _as_object(info: dict[str, Any]) -> Object:
    crc32c = str(info.get("crc32c") or "")
    size = info.get("size")
    return Object(-1 if size is None else int(size), crc32c or str(info.get("ETag") or info.get("etag") or ""), crc32c)


def match_objects(url: str) -> tuple[str, Objects, list[str]]:
    """Lists what a URL names: an object, all below a folder, or those that match a pattern with * and ?.

    Returns:
      The URL of the folder that names are relative to, the objects below it that were listed, and the names in natural
      order.

    Raises:
      UserError: as `list_objects`.
    """
    protocol, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    has_pattern = has_wildcard(rest)
    plain = num_plain_parts(parts) if has_pattern else len(parts)
    base = f"{protocol}://{'/'.join(parts[:plain])}"
    objects = list_objects(base)
    if list(objects) == [""]:
        return base.rpartition("/")[0], {parts[-1]: objects[""]}, [parts[-1]]
    if not has_pattern:
        return base, objects, walk_names(objects)
    pattern = re.compile(fsspec.utils.glob_translate("/".join(parts[plain:])))
    return base, objects, sorted(filter(pattern.match, filter(is_visible, objects)), key=natural_key)


def has_wildcard(path: str) -> bool:
    """Returns whether a path is a pattern."""
    return bool(_WILDCARD.search(path))


def num_plain_parts(parts: Sequence[str]) -> int:
    """Returns the number of the parts of a path before the first with a wildcard, or before the last."""
    return next((i for i, part in enumerate(parts) if has_wildcard(part)), len(parts) - 1)


def walk_names(names: Iterable[str]) -> list[str]:
    """Returns the names without hidden ones, in the order of `listing.walk_files`."""
    return sorted(filter(is_visible, names), key=_walk_key)


def _walk_key(path: str) -> list[tuple[Any, ...]]:
    """Sort key: a folder's own files come before its subfolders."""
    *folders, name = path.split("/")
    return [*((1, natural_key(folder)) for folder in folders), (0, natural_key(name))]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def make_copies_folder() -> tuple[tempfile.TemporaryDirectory[str], IO[str]]:
    """Makes a temporary folder for copies, and removes those of processes that were killed.

    Returns:
      The folder, and the open file whose lock tells that its process runs.
    """
    _remove_abandoned()
    while True:
        folder = tempfile.TemporaryDirectory(prefix=_COPIES, ignore_cleanup_errors=True)
        path = os.path.join(folder.name, _LOCK)
        with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            if (lock := files.lock_file(path)) is not None:
                if os.path.exists(path):
                    return folder, lock
                lock.close()


def _remove_abandoned() -> None:
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_COPIES}*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile
            if files.has_locks(folder) and (lock := files.lock_file(folder / _LOCK)) is not None:
                with lock:
                    shutil.rmtree(folder, ignore_errors=True)
