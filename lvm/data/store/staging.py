"""Staging: shards copied to local disk and checked, once per host."""

import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError


def stage(path: epath.Path, expected: Mapping[str, Any], folder: epath.Path) -> epath.Path:
    """Returns a local copy of a store's file; one process copies it, the others wait.

    Args:
      path: the file, local or gs://.
      expected: its {"bytes", "sha256"} in the manifest.
      folder: of this store's copies. A file there under its final name has been checked.

    Raises:
      UserError: the file is missing, or the copy differs from the manifest.
    """
    copy = folder / path.name
    if copy.exists():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock_file(folder / f".{path.name}.lock", wait=True):  # type: ignore[union-attr]  # it waits
        if copy.exists():
            return copy
        # Without locks, several processes may copy it at once.
        unique = "" if files.has_locks(folder) else f".{uuid.uuid4().hex}"
        temporary = folder / f".{path.name}{unique}.tmp"
        try:
            with files.clear_disk_errors(temporary):
                _download(path, temporary)
            actual: dict[str, Any] = {"bytes": files.file_size(temporary), "sha256": files.sha256(temporary)}
            if actual != expected:
                raise UserError(
                    f"{path}: damaged: its copy in {folder} has {actual['bytes']} bytes, sha256 "
                    f"{actual['sha256'][:12]}; the manifest says {expected['bytes']}, {expected['sha256'][:12]}"
                )
            files.put(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    return copy


def _download(path: epath.Path, local: epath.Path) -> None:
    try:
        files.download(path, local)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing, the manifest lists it; encode it again") from error
