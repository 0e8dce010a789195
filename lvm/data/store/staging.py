"""Shards copied to local disk, each once a host and checked on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError


def stage(file: epath.Path, listed: Mapping[str, Any], folder: epath.Path) -> epath.Path:
    """A local copy of a store's file; whoever asks first copies it, the others wait.

    Args:
      file: in the store, local or gs://.
      listed: its {"bytes", "sha256"} in the manifest.
      folder: where copies of this store's files lie. A file that stands there under its name was checked.

    Raises:
      UserError: what was copied is not what the manifest tells.
    """
    copy = folder / file.name
    if copy.exists():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock_file(folder / f".{file.name}.lock", wait=True):  # type: ignore[union-attr]  # it waits
        if copy.exists():
            return copy
        temporary = folder / f".{file.name}.tmp"
        try:
            with files.clear_disk_errors(temporary):
                _download(file, temporary)
            found = {"bytes": temporary.stat().length, "sha256": files.sha256(temporary)}
            if found != listed:
                raise UserError(
                    f"{file}: {found['bytes']} bytes of checksum {found['sha256'][:12]} came to {folder}, the "
                    f"manifest says {listed['bytes']} of {listed['sha256'][:12]}: damaged there or on its way"
                )
            files.put(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    return copy


def _download(file: epath.Path, local: epath.Path) -> None:
    try:
        files.download(file, local)
    except FileNotFoundError as error:
        raise UserError(f"{file}: is missing, the manifest lists it; encode it again") from error
