"""What lies on disk: files in natural order, what is passed over, and a hash that tells two listings apart."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from lvm.common.errors import UserError
from lvm.data.images.sources.base import Failure

SETTINGS_FILES = ("classes.json", "streams.json")
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif",
)  # fmt: skip
NOT_UTF8 = "its name is not UTF-8"
_ENDS = ".index.json"  # what a source leaves beside its files


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sort key that puts frame 2 before frame 10; of 2 and 02, which are one number, the order is always the same."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def printable(name: str) -> str:
    """A file's name as it can be printed and stored: another one where its bytes are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def walk_files(top: pathlib.Path, skip: Callable[[pathlib.Path, str], None]) -> Iterator[tuple[str, str]]:
    """All files under `top` but hidden ones as (folder, name), in natural order; links are followed.

    Args:
      top: the folder.
      skip: is told of each folder that can't be listed, or is listed already, of names that no key can be made of,
        and the reason.
    """

    def unlisted(error: OSError) -> None:
        skip(pathlib.Path(error.filename), f"can't be listed: {error.strerror}")

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=unlisted):
        real = os.path.realpath(folder)
        if real in seen:  # a link may lead to a folder that it lies in
            skip(pathlib.Path(folder), "a link to a folder that is listed already")
            subfolders.clear()
            continue
        seen.add(real)
        relative = pathlib.PurePath(folder).relative_to(top).as_posix().removeprefix(".")
        for entries in (subfolders, names):
            entries[:] = sorted((entry for entry in entries if not entry.startswith(".")), key=natural_key)
            for entry in [entry for entry in entries if printable(entry) != entry]:
                skip(pathlib.Path(folder, printable(entry)), NOT_UTF8)
                entries.remove(entry)
        for name in names:
            yield relative, name


def find_files(path: str, suffixes: Sequence[str], skipped: list[Failure]) -> tuple[pathlib.Path, list[str]]:
    """The files that a source is of.

    Args:
      path: a file, a folder (all below it that end in one of `suffixes`), or a pattern with * and ? of files.
      suffixes: in lower case, with their dot.
      skipped: gets what else lies in a folder, or fits a pattern, with the reason.

    Returns:
      The folder that they lie in, and their paths below it, in natural order.

    Raises:
      UserError: there is no such file.
    """
    expected = f"expected a file, a folder or a pattern of files ending in {', '.join(suffixes)}"
    root = pathlib.Path(path)
    if root.is_file():
        if not root.name.lower().endswith(tuple(suffixes)):
            raise UserError(f"{path}: {expected}")
        return root.parent, [root.name]
    if root.is_dir():
        skip = lambda folder, reason: skipped.append(Failure(folder.relative_to(root).as_posix(), reason))  # noqa: E731
        found = ["/".join(filter(None, place)) for place in walk_files(root, skip)]
    else:
        root, found = _glob(path)
    files = []
    for file in found:
        if file.lower().endswith(tuple(suffixes)):
            files.append(file)
        elif pathlib.PurePath(file).name not in SETTINGS_FILES and not file.endswith(_ENDS):
            skipped.append(Failure(file, f"does not end in {', '.join(suffixes)}"))
    if not files:
        raise UserError(f"{path}: found {'none' if found else 'nothing'} there; {expected}")
    return root, files


def _glob(path: str) -> tuple[pathlib.Path, list[str]]:
    parts = pathlib.PurePath(path).parts
    plain = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts) - 1)
    root = pathlib.Path(*parts[:plain]) if plain else pathlib.Path()
    found = (file for file in root.glob("/".join(parts[plain:])) if file.is_file())
    return root, sorted((file.relative_to(root).as_posix() for file in found), key=natural_key)


def size_and_tail(path: pathlib.Path, most: int = 256) -> tuple[int, bytes]:
    """A file's size and its last bytes, which in compressed files depend on all before; unreadable: none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return size, file.read()
    except OSError:
        return 0, b""


def hash_files(root: pathlib.Path, files: Iterable[str], most: int = 65536) -> str:
    """A hash of files' names, sizes and last bytes; these hold the index of all formats that have one."""
    digest = hashlib.sha256()
    for file in files:
        size, end = size_and_tail(root / file, most)
        digest.update(f"{file} {size}\n".encode() + end)
    return digest.hexdigest()


def check_index(index: int, count: int) -> None:
    """Raises IndexError for a scene that there isn't."""
    if not 0 <= index < count:
        raise IndexError(f"scene {index} of {count}")


def read_range(path: pathlib.Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file, by any number of threads at once. Raises OSError, also where there are fewer."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise OSError(f"ends {size - len(data)} bytes early")
    return data


def relative_to(root: pathlib.Path, error: Exception) -> str:
    """An error's text with the paths below `root` as they are there: a store tells no folder of the machine."""
    return str(error).replace(f"{root}{os.sep}", "")
