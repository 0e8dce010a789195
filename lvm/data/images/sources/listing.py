"""Names of the files of a source, and reading of their bytes."""

import os
import pathlib
import re
from collections.abc import Callable, Iterator

from lvm.common.errors import check_available

SETTINGS_FILES = ("classes.json", "streams.json")
IMAGE_FORMATS = {  # Pillow's name → suffixes of files; others of its formats are not opened: some start programs
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif",
)  # fmt: skip
SUFFIXES = {  # of the files of each kind of source; a folder of image files has its own listing
    "video": VIDEO_SUFFIXES,
    "tar": (".tar",),
    "array_record": (".array_record", ".arrayrecord"),
    "parquet": (".parquet",),
    "jsonl": (".jsonl",),
}
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z")
COMPRESSED = "it is compressed, and has no random access; unpack it to a plain .tar"
NOT_UTF8 = "its name is not UTF-8"
INDEX_SUFFIX = ".index.json"  # written by sources beside their files

Skip = Callable[[str, str], None]  # receives a path inside the source, and the reason


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that puts frame 2 before frame 10; ties, such as 2 and 02, are broken by the name."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def suffix_of(name: str | pathlib.PurePath) -> str:
    """Returns the suffix of a file's name in lower case, such as ".jpg": it tells images and videos in every source."""
    return pathlib.PurePath(name).suffix.lower()


def printable(name: str) -> str:
    """Returns the name with bytes that are not UTF-8 escaped."""
    return name.encode(errors="backslashreplace").decode()


def walk_files(top: pathlib.Path, skip: Skip) -> Iterator[tuple[str, str]]:
    """Yields the files under `top`, except hidden ones, as (folder, name) in natural order. Follows links.

    `skip` receives folders that can't be listed or were listed before, and names that are not UTF-8. Raises
    UnavailableError as `check_available`.
    """

    def relative(path: str) -> str:
        return pathlib.PurePath(path).relative_to(top).as_posix()

    seen: set[str] = set()
    on_error = lambda error: skip(relative(error.filename), f"can't be listed: {failure_reason(top, error)}")  # noqa: E731
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=on_error):
        real = os.path.realpath(folder)
        if real in seen:  # a link may lead to a folder that contains it
            skip(relative(folder), "a link to a folder that is listed already")
            subfolders.clear()
            continue
        seen.add(real)
        for entries in (subfolders, names):
            entries[:] = sorted((entry for entry in entries if not entry.startswith(".")), key=natural_key)
            for entry in [entry for entry in entries if printable(entry) != entry]:
                skip(relative(os.path.join(folder, printable(entry))), NOT_UTF8)
                entries.remove(entry)
        for name in names:
            yield relative(folder).removeprefix("."), name


def is_visible(path: str) -> bool:
    """Returns whether no part of a relative path is hidden."""
    return not any(part.startswith(".") for part in path.split("/"))


def read_tail(path: pathlib.Path, size: int) -> tuple[int, bytes]:
    """Returns a file's size, and its last `size` bytes. Raises OSError."""
    with open(path, "rb") as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(max(0, total - size))
        return total, file.read()


def read_range(path: pathlib.Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes of a file; thread-safe. Raises OSError, also for a file that ends early."""
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


def failure_reason(root: pathlib.Path, error: Exception) -> str:
    """Returns an error's text in one line, paths relative to `root`: a store must not name folders of this machine.

    Raises UnavailableError as `check_available`.
    """
    check_available(error)
    return " ".join(str(getattr(error, "strerror", None) or error).replace(f"{root}{os.sep}", "").split())
