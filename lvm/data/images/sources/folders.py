"""Folders of a source's files: local ones, and those of object storage, whose files are copied here to be read."""

import collections
import contextlib
import functools
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from lvm.common.errors import UserError
from lvm.data.images.sources import remote
from lvm.data.images.sources.image_file import Content
from lvm.data.images.sources.listing import (
    SETTINGS_FILES,
    Skip,
    is_visible,
    natural_key,
    read_tail,
    walk_files,
)
from lvm.data.images.sources.remote import Object, Objects

T = TypeVar("T")

_BLOCK_BYTES = 1 << 18  # of a file that is read in part


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

    def peek(self, file: str, read: Callable[[BinaryIO], T], own_errors: tuple[type[Exception], ...]) -> T:
        """Returns `read()` of an open file of which it needs little. Raises OSError, or as `remote.retry`."""
        with open(self.path / file, "rb") as content:
            return read(content)

    def stamp(self, file: str, tail_bytes: int) -> tuple[int, bytes]:
        """The size of a file, and what changes with its content: its last bytes, or the storage's checksum."""
        return read_tail(self.path / file, tail_bytes)

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """A context whose UserErrors name this folder, not that of copies."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(self.path), str(self))) from error

    def hold(self, file: str) -> pathlib.Path:
        """Returns the local path of a file that stays until `release`. Raises OSError, or as `remote.retry`."""
        return self.path / file

    def local(self, file: str) -> pathlib.Path:
        """Returns the local path of a file. Raises OSError, or as `remote.retry`."""
        return self.path / file

    def release(self, file: str) -> None:
        """Ends a `hold`."""


class RemoteFolder(Folder):
    """A folder of object storage, of any protocol of fsspec.

    A file is copied whole into a temporary folder when it is first needed, since decoders of videos, Parquet and
    ArrayRecord want files, and is read there by all worker processes; the copy is removed when nobody holds it. Image
    files are read into memory instead. What is read is compared with the size, and the CRC-32C, of the listing. A copy
    of the folder in another process shares the temporary folder.

    Args:
      url: of the folder.
      objects: as they were listed, by path inside the folder.

    Raises:
      UserError: no package for its protocol.
    """

    def __init__(self, url: str, objects: Objects):
        self.url, self.name, self._objects = url.rstrip("/"), url.rstrip("/").rpartition("/")[2], objects
        self._copies, self._owner_lock = remote.make_copies_folder()
        self.path = pathlib.Path(self._copies.name)
        self._reset()
        for file in SETTINGS_FILES:
            if file in objects:
                self.local(file)

    def _reset(self) -> None:
        self._holders, self._lock = collections.Counter[str](), threading.Lock()
        self._copy_locks: dict[str, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Neither the objects, whose number may be large, nor the right to remove the folder.
        return {"url": self.url, "name": self.name, "path": self.path, "_objects": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __str__(self) -> str:
        return self.url

    def walk(self, skip: Skip, below: str = "") -> Iterator[tuple[str, str]]:
        prefix = f"{below}/" if below else ""
        for name in remote.walk_names(file[len(prefix) :] for file in self._objects if file.startswith(prefix)):
            folder, _, file = name.rpartition("/")
            yield folder, file

    def is_folder(self, name: str) -> bool:
        return any(file.startswith(f"{name}/") for file in self._objects)

    def entries(self) -> list[str]:
        return sorted({file.split("/")[0] for file in self._objects if is_visible(file)}, key=natural_key)

    def content(self, file: str) -> Content:
        return functools.partial(self.read, file)

    def peek(self, file: str, read: Callable[[BinaryIO], T], own_errors: tuple[type[Exception], ...]) -> T:
        filesystem, root = remote.filesystem_of(self.url)

        def open_and_read() -> T:
            with filesystem.open(f"{root}/{file}", "rb", block_size=_BLOCK_BYTES) as content:
                return read(content)

        return remote.retry(open_and_read, own_errors)

    def stamp(self, file: str, tail_bytes: int) -> tuple[int, bytes]:
        listed = self._objects.get(file, Object(0, ""))
        return listed.size, listed.checksum.encode()

    def read(self, file: str) -> bytes:
        """Reads a file into memory. Raises UnreadableError if it is missing, UnavailableError if the storage is."""
        return remote.read_object(f"{self.url}/{file}", self._objects.get(file))

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
        with self._lock:
            copy_lock = self._copy_locks.setdefault(file, threading.Lock())
        with copy_lock:  # threads that list pieces of a file copy it once
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
                try:
                    remote.copy_object(f"{self.url}/{file}", temporary, self._objects.get(file))
                    os.replace(temporary, path)  # another process may have copied it at the same time
                finally:
                    temporary.unlink(missing_ok=True)
        return path

    def release(self, file: str) -> None:
        with self._lock:
            self._holders[file] -= 1
            if self._holders[file] <= 0:
                del self._holders[file]
                self._copy_locks.pop(file, None)
                (self.path / file).unlink(missing_ok=True)
