"""Where scenes come from: folders of files, and scenes generated from a seed."""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from lvm.data.preprocess import Preprocess
from lvm.data.sources.base import Failure, SceneImages, SceneInfo, Source
from lvm.data.sources.folder import FolderSource
from lvm.data.sources.generated import GeneratedScenes
from lvm.errors import UserError

__all__ = ["Failure", "SceneImages", "SceneInfo", "Source", "open_source"]

KINDS = {"generated": GeneratedScenes}


def open_source(spec: str, preprocess: Preprocess, overrides: Mapping[str, Any] | None = None) -> Source:
    """Opens a folder of files, or the source that a config file describes.

    Args:
      spec: a folder (see `FolderSource` for its layouts), or a config file ending in .py whose
        `get_config()` returns a ConfigDict with the `kind` of source and its parameters.
      preprocess: how pictures become images.
      overrides: parameters that replace those of the config file, or the defaults of a folder.

    Raises:
      UserError: when `spec` is neither, or a kind, key or value in it is wrong.
    """
    path = pathlib.Path(spec)
    if path.is_dir():
        return FolderSource(path, preprocess, **(overrides or {}))
    if path.suffix == ".py" and path.is_file():
        parameters = {**_read_config(path), **(overrides or {})}
        kind = parameters.pop("kind", None)
        if kind not in KINDS:
            raise UserError(f"{spec}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        try:
            return KINDS[kind](preprocess, **parameters)
        except UserError as error:
            raise UserError(f"{spec}: {error}") from error
    found = "a file" if path.is_file() else "nothing"
    raise UserError(
        f"{spec}: found {found} there; expected a folder of images, or a config file ending in .py with "
        "get_config(), such as configs/demo_scenes.py"
    )


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = runpy.run_path(str(path))["get_config"]()
        return dict(config.items())
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; expected a file with a get_config() that returns a "
            "ConfigDict"
        ) from error
