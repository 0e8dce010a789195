"""Files of a source: those that a path names, and a hash of them."""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

from lvm.common import files
from lvm.common.errors import UserError, check_available
from lvm.data.images.sources.folders import Folder, RemoteFolder
from lvm.data.images.sources.listing import (
    COMPRESSED,
    COMPRESSED_SUFFIXES,
    INDEX_SUFFIX,
    SETTINGS_FILES,
    Skip,
    is_visible,
    natural_key,
    walk_files,
)
from lvm.data.images.sources.remote import list_objects, match_objects, num_plain_parts

_BATCH_BYTES, _BATCHES = 65536, 512  # of the ends of files


def open_folder(path: str) -> Folder | None:
    """Returns the folder at a local path or URL, None if there is none. Raises UserError as `locate`."""
    if not files.is_remote(path):
        return Folder(pathlib.Path(path)) if os.path.isdir(path) else None
    objects = list_objects(path)
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
        base, objects, names = match_objects(path)
        return RemoteFolder(base, objects), names
    root = pathlib.Path(path)
    if root.is_file():
        return Folder(root.parent), [root.name]
    if root.is_dir():
        return Folder(root), ["/".join(filter(None, entry)) for entry in walk_files(root, skip)]
    plain = num_plain_parts(root.parts)
    root, pattern = pathlib.Path(*root.parts[:plain]), "/".join(root.parts[plain:])
    matches = (file.relative_to(root).as_posix() for file in root.glob(pattern) if file.is_file())
    return Folder(root), sorted(filter(is_visible, matches), key=natural_key)


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
    digest, remaining = hashlib.sha256(), iter(names)

    def describe(batch: Sequence[tuple[str, str]]) -> bytes:
        return b"".join(_describe_file(folder, name, file, tail_bytes) for name, file in batch)

    # Many at once, for the file systems of networks; in batches, since threads cost more than a local file's few bytes.
    batches = iter(lambda: [*itertools.islice(remaining, max(1, _BATCH_BYTES // tail_bytes))], [])
    while next_batches := [*itertools.islice(batches, _BATCHES)]:
        for described in files.map_concurrently(describe, next_batches):
            digest.update(described)
    return digest.hexdigest()


def _describe_file(folder: Folder, name: str, file: str, tail_bytes: int) -> bytes:
    try:
        size, stamp = folder.stamp(file, tail_bytes)
    except OSError as error:  # it fails again when its scene is loaded
        check_available(error)
        size, stamp = 0, b""
    return f"{name} {size}\n".encode() + stamp
