"""Folders of a source's files: local ones, and those of object storage, whose files are copied here to be read."""

import collections
import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import fsspec
import fsspec.utils

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.images.sources.image_file import Content, UnavailableError, UnreadableError
from lvm.data.images.sources.listing import (
    COMPRESSED,
    COMPRESSED_SUFFIXES,
    INDEX_SUFFIX,
    SETTINGS_FILES,
    Skip,
    is_visible,
    natural_key,
    read_tail,
    walk_files,
)

T = TypeVar("T")

_RETRY_DELAYS_S = (0.2, 1.0, 5.0, 20.0)
_BLOCK_BYTES = 1 << 18  # of a file that is read in part
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_WILDCARD = re.compile(r"[*?\[]")


class Folder:
    """A local folder of a source's files.

    Attributes:
      path: of the folder.
      name: for logs and manifests.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, path.resolve().name

    def __str__(self) -> str:
        return str(self.path)

    def walk(self, skip: Skip, below: str = "") -> Iterator[tuple[str, str]]:
        """Yields the files below a subfolder, relative to it; see `listing.walk_files`."""
        return walk_files(self.path / below, skip)

    def is_folder(self, name: str) -> bool:
        """Returns whether it has a subfolder of this name."""
        return (self.path / name).is_dir()

    def entries(self) -> list[str]:
        """Names of its files and subfolders, without hidden ones, in natural order."""
        names = (entry.name for entry in self.path.iterdir())
        return sorted((name for name in names if not name.startswith(".")), key=natural_key)

    def content(self, file: str) -> Content:
        """The content of a file, for `ImageFile`: its path, or a function that reads it."""
        return self.path / file

    def open(self, file: str) -> BinaryIO:
        """Opens a file of which little is to be read. Raises OSError, or as `RemoteFolder.read`."""
        return open(self.path / file, "rb")

    def stamp(self, file: str, tail_bytes: int) -> tuple[int, bytes]:
        """The size of a file, and what changes with its content: its last bytes, or the storage's checksum."""
        return read_tail(self.path / file, tail_bytes)

    def hold(self, file: str) -> pathlib.Path:
        """Returns the local path of a file that stays until `release`. Raises OSError, or as `read`."""
        return self.path / file

    def local(self, file: str) -> pathlib.Path:
        """Returns the local path of a file. Raises OSError, or as `read`."""
        return self.path / file

    def release(self, file: str) -> None:
        """Ends a `hold`."""


class RemoteFolder(Folder):
    """A folder of object storage, of any protocol of fsspec.

    A file is copied whole into a temporary folder when it is first needed, since decoders of videos, Parquet and
    ArrayRecord want files, and is read there by all worker processes; the copy is removed when nobody holds it. Image
    files are read into memory instead. A copy of the folder in another process shares the temporary folder.

    Args:
      url: of the folder.
      objects: size in bytes, and the checksum or version that the storage has, by path inside the folder.

    Raises:
      UserError: no package for its protocol.
    """

    def __init__(self, url: str, objects: dict[str, tuple[int, str]]):
        self.url, self.name, self._objects = url.rstrip("/"), url.rstrip("/").rpartition("/")[2], objects
        self._scratch = tempfile.TemporaryDirectory(prefix="lvm-source-", ignore_cleanup_errors=True)
        self.path = pathlib.Path(self._scratch.name)
        self._reset()
        for file in SETTINGS_FILES:
            if file in objects:
                self.local(file)

    def _reset(self) -> None:
        self._holders, self._lock = collections.Counter[str](), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "name": self.name, "path": self.path}  # neither the objects, nor the right to remove

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __str__(self) -> str:
        return self.url

    def walk(self, skip: Skip, below: str = "") -> Iterator[tuple[str, str]]:
        prefix = f"{below}/" if below else ""
        names = (file[len(prefix) :] for file in self._objects if file.startswith(prefix))
        for name in sorted(filter(is_visible, names), key=_walk_key):
            folder, _, file = name.rpartition("/")
            yield folder, file

    def is_folder(self, name: str) -> bool:
        return any(file.startswith(f"{name}/") for file in self._objects)

    def entries(self) -> list[str]:
        return sorted({file.split("/")[0] for file in self._objects if is_visible(file)}, key=natural_key)

    def content(self, file: str) -> Content:
        return functools.partial(self.read, file)

    def open(self, file: str) -> BinaryIO:
        filesystem, root = filesystem_of(self.url)
        return _retry(lambda: filesystem.open(f"{root}/{file}", "rb", block_size=_BLOCK_BYTES))

    def stamp(self, file: str, tail_bytes: int) -> tuple[int, bytes]:
        size, checksum = self._objects.get(file, (0, ""))
        return size, checksum.encode()

    def read(self, file: str) -> bytes:
        """Reads a file into memory. Raises UnreadableError if it is missing, UnavailableError if the storage is."""
        filesystem, root = filesystem_of(self.url)
        return _retry(lambda: filesystem.cat_file(f"{root}/{file}"))

    def hold(self, file: str) -> pathlib.Path:
        with self._lock:
            self._holders[file] += 1
        try:
            return self.local(file)
        except BaseException:
            self.release(file)
            raise

    def local(self, file: str) -> pathlib.Path:
        path = self.path / file
        if not path.exists():
            filesystem, root = filesystem_of(self.url)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
            try:
                _retry(lambda: filesystem.get_file(f"{root}/{file}", str(temporary)))
                os.replace(temporary, path)  # workers may copy the same file at the same time
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def release(self, file: str) -> None:
        with self._lock:
            self._holders[file] -= 1
            if self._holders[file] <= 0:
                del self._holders[file]
                (self.path / file).unlink(missing_ok=True)


def open_folder(path: str) -> Folder | None:
    """Returns the folder at a local path or URL, None if there is none. Raises UserError as `locate`."""
    if not files.is_remote(path):
        return Folder(pathlib.Path(path)) if os.path.isdir(path) else None
    objects = _list_objects(path)
    return RemoteFolder(path, objects) if objects.keys() - {""} else None


def locate(path: str, skip: Skip) -> tuple[Folder, list[str]]:
    """Returns the root folder of a source, and the paths below it of the files that a path names, in natural order.

    Args:
      path: a file, a folder (all files below it), or a pattern of files with * and ?; local, or the URL of one.
      skip: receives folders and names that can't be used.

    Raises:
      UserError: the URL has no known protocol, or can't be listed.
    """
    if files.is_remote(path):
        return _locate_remote(path)
    root = pathlib.Path(path)
    if root.is_file():
        return Folder(root.parent), [root.name]
    if root.is_dir():
        return Folder(root), ["/".join(filter(None, entry)) for entry in walk_files(root, skip)]
    plain = _plain_parts(root.parts)
    root, pattern = pathlib.Path(*root.parts[:plain]), "/".join(root.parts[plain:])
    matches = (file for file in root.glob(pattern) if file.is_file())
    return Folder(root), sorted((file.relative_to(root).as_posix() for file in matches), key=natural_key)


def find_files(path: str, suffixes: Sequence[str], skip: Skip) -> tuple[Folder, list[str]]:
    """Returns what `locate` does, without the files that don't end in one of `suffixes`.

    Args:
      path: as for `locate`.
      suffixes: in lower case, with their dot.
      skip: receives the other files of a folder or pattern.

    Raises:
      UserError: as `locate`, or there is no such file.
    """
    folder, candidates = locate(path, skip)
    paths = []
    for file in candidates:
        if file.lower().endswith(tuple(suffixes)):
            paths.append(file)
        elif pathlib.PurePath(file).name not in SETTINGS_FILES and not file.endswith(INDEX_SUFFIX):
            is_compressed = file.lower().endswith(COMPRESSED_SUFFIXES)
            skip(file, COMPRESSED if is_compressed else f"does not end in {', '.join(suffixes)}")
    if not paths:
        for file in candidates:
            if file.lower().endswith(COMPRESSED_SUFFIXES):
                raise UserError(f"{folder}/{file}: {COMPRESSED}")
        expected = f"expected a file, a folder or a pattern of files ending in {', '.join(suffixes)}"
        raise UserError(f"{path}: found {'none' if candidates else 'nothing'} there; {expected}")
    return folder, paths


def hash_files(folder: Folder, names: Iterable[tuple[str, str]], tail_bytes: int) -> str:
    """Hashes each file's name, size and `stamp`: its last bytes hold its index or, if compressed, depend on all before.

    Args:
      folder: the files'.
      names: (name, file) of each.
      tail_bytes: number of the last bytes of a local file.
    """
    digest = hashlib.sha256()
    for name, file in names:
        try:
            size, stamp = folder.stamp(file, tail_bytes)
        except OSError:  # it fails again when its scene is loaded
            size, stamp = 0, b""
        digest.update(f"{name} {size}\n".encode() + stamp)
    return digest.hexdigest()


def _plain_parts(parts: Sequence[str]) -> int:
    """Number of the parts of a path before the first with a wildcard, or before the last."""
    return next((i for i, part in enumerate(parts) if _WILDCARD.search(part)), len(parts) - 1)


def _locate_remote(url: str) -> tuple[Folder, list[str]]:
    """`locate` of a URL: one listing of what is below its part without wildcards."""
    protocol, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    has_pattern = bool(_WILDCARD.search(rest))
    plain = _plain_parts(parts) if has_pattern else len(parts)
    base = f"{protocol}://{'/'.join(parts[:plain])}"
    objects = _list_objects(base)
    if list(objects) == [""]:  # a single file
        folder: Folder = RemoteFolder(base.rpartition("/")[0], {parts[-1]: objects[""]})
        return folder, [parts[-1]]
    folder = RemoteFolder(base, objects)
    if not has_pattern:
        return folder, ["/".join(filter(None, entry)) for entry in folder.walk(lambda path, reason: None)]
    pattern = re.compile(fsspec.utils.glob_translate("/".join(parts[plain:])))
    return folder, sorted(filter(pattern.match, objects), key=natural_key)


def _list_objects(url: str) -> dict[str, tuple[int, str]]:
    """Size and checksum of the objects below a URL, by relative path; of "" if it is one itself."""
    filesystem, root = filesystem_of(url)

    def list_all() -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            return filesystem.find(root, detail=True)
        return {}

    try:
        found = _retry(list_all)
    except (UnreadableError, UnavailableError) as error:
        raise UserError(f"{url}: can't be listed: {error}") from error
    root = root.strip("/")
    return {
        path.strip("/")[len(root) :].lstrip("/"): (int(info["size"]), _checksum(info))
        for path, info in found.items()
        if info.get("type", "file") == "file" and not path.endswith("/")  # markers of empty folders
    }


def _checksum(info: dict[str, Any]) -> str:
    """What a storage service tells of an object's content: CRC-32C (gs://), ETag (s3://)."""
    return str(info.get("crc32c") or info.get("ETag") or info.get("etag") or "")


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path inside it. Raises UserError: an unknown protocol, or no package."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = _PACKAGES.get(protocol, getattr(error, "name", None) or "its package")
        extra = ': pip install "lvm[s3]"' if package == "s3fs" else ""
        raise UserError(f"{url}: reading {protocol}:// needs {package}, which is not installed{extra}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; expected a local path, gs://…, s3://… or another URL of fsspec") from error


def _retry(function: Callable[[], T]) -> T:
    """Returns `function()`; retries on errors of the network and the service.

    Raises:
      UnreadableError: there is no such object, or no permission to read it.
      UnavailableError: the storage does not answer: no reason to go on without the file.
      UserError: the disk of temporary files is full.
    """
    for delay_s in (*_RETRY_DELAYS_S, None):
        try:
            return function()
        except FileNotFoundError:
            raise UnreadableError("no such object") from None
        except PermissionError as error:
            raise UnreadableError(_one_line(error)) from error
        except Exception as error:  # each protocol's library has its own, of aiohttp or botocore
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                folder = tempfile.gettempdir()
                raise UserError(f"{folder}: {error.strerror}; set TMPDIR to a disk with space for copies") from error
            if delay_s is None:
                raise UnavailableError(_one_line(error)) from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _walk_key(path: str) -> list[tuple[Any, ...]]:
    """Sort key of the order in which `walk_files` yields paths: a folder's own files come before its subfolders."""
    *folders, name = path.split("/")
    return [*((1, natural_key(folder)) for folder in folders), (0, natural_key(name))]
