"""Where scenes come from: files of many kinds, ready codes, and scenes generated from a seed (docs/data.md)."""

from __future__ import annotations

import importlib
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from lvm.common.config import find_config
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import CodeSource, Failure, ImageSource, SceneCodes, SceneImages, SceneInfo
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.images.sources.image_file import IMAGE_SUFFIXES
from lvm.data.images.sources.listing import VIDEO_SUFFIXES, walk_files

__all__ = [
    "CodeSource",
    "Failure",
    "ImageSource",
    "SceneCodes",
    "SceneImages",
    "SceneInfo",
    "open_any_source",
    "open_source",
]  # fmt: skip

# Each is imported when it is asked for, with the libraries that it alone needs.
KINDS = {
    "generated": "generated.GeneratedSource",
    "folder": "folder.FolderSource",
    "video": "video.VideoSource",
    "tar": "tar.TarSource",
    "tfds": "tfds.TfdsSource",
    "array_record": "array_record.ArrayRecordSource",
    "parquet": "parquet.ParquetSource",
    "coco": "coco.CocoSource",
    "jsonl": "jsonl.JsonlSource",
}
_WITHOUT_PATH = ("generated", "tfds", "coco")
_BY_SUFFIX = dict.fromkeys(VIDEO_SUFFIXES, "video") | {
    ".tar": "tar",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
}


def open_source(spec: str, preprocess: Preprocess, overrides: Mapping[str, Any] | None = None) -> ImageSource:
    """Opens what scenes of images come from.

    Args:
      spec: a folder: of pictures (see `FolderSource` for its layouts), or of videos, tars or whatever kind of `KINDS`
        its first file is; a file of such a kind; or a config file ending in .py whose `get_config()` returns a
        ConfigDict with the `kind` of source and its parameters. `derived`, with every kind, names streams that
        are computed from rgb (`lvm.data.streams.derived`), `derived_seed` seeds them.
      preprocess: how pictures become images.
      overrides: parameters that replace those of the config file, or the defaults of a folder.

    Raises:
      UserError: when `spec` is none of these, a kind, key or value in it is wrong, or it holds ready codes.
    """
    source = open_any_source(spec, preprocess, overrides)
    if not isinstance(source, ImageSource):
        raise UserError(f"{spec}: holds ready codes, not images; only tokenizer.encode takes it")
    return source


def open_any_source(
    spec: str, preprocess: Preprocess, overrides: Mapping[str, Any] | None = None
) -> ImageSource | CodeSource:
    """As `open_source`, but for sources of ready codes too, which have `load_codes` in the place of `load`."""
    path, parameters = pathlib.Path(find_config(spec)), dict(overrides or {})
    if path.is_dir():
        kind = _kind_of_folder(path)
    elif path.suffix == ".py" and path.is_file():
        parameters = _read_config(path) | parameters
        kind = parameters.pop("kind", None)
        if kind not in KINDS:
            raise UserError(f"{spec}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    elif path.is_file() and path.suffix.lower() in _BY_SUFFIX:
        kind = _BY_SUFFIX[path.suffix.lower()]
    else:
        found = "a file" if path.is_file() else "nothing"
        raise UserError(
            f"{spec}: found {found} there; expected a folder of images, or a config file ending in .py with "
            f"get_config(), such as configs/demo_scenes.py, or a file ending in {', '.join(_BY_SUFFIX)}"
        )
    if path.suffix != ".py" or path.is_dir():
        return _open(kind, preprocess, parameters | {"path": spec})
    try:
        return _open(kind, preprocess, parameters)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error


def _open(kind: str, preprocess: Preprocess, parameters: dict[str, Any]) -> ImageSource | CodeSource:
    if kind not in _WITHOUT_PATH and not parameters.get("path"):
        raise UserError(f"path: is missing; a source of kind {kind!r} needs to know where its files lie")
    derived, seed = parameters.pop("derived", ()), parameters.pop("derived_seed", 0)
    module, _, name = KINDS[kind].partition(".")
    source = getattr(importlib.import_module(f"{__name__}.{module}"), name)(
        preprocess=preprocess, **parameters
    )
    if not derived:
        return source
    if not isinstance(source, ImageSource):
        raise UserError("derived: streams are computed from images, and this source holds ready codes")
    return DerivedStreams(source, derived, seed)


def _kind_of_folder(folder: pathlib.Path) -> str:
    """The kind of the first file, in natural order, that is of any; pictures are a folder's own."""
    for _, name in walk_files(folder, lambda folder, reason: None):
        suffix = pathlib.PurePath(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return "folder"
        if suffix in _BY_SUFFIX:
            return _BY_SUFFIX[suffix]
    return "folder"  # which says what it expects


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
