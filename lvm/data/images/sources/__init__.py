"""Image sources: files of many kinds, ready codes, and scenes generated from a seed (docs/data.md)."""

import importlib
import json
import pathlib
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from lvm.common import files
from lvm.common.config import find_config
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import CodeSource, ImageSource
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.images.sources.finding import locate
from lvm.data.images.sources.listing import COMPRESSED_SUFFIXES, IMAGE_SUFFIXES, SUFFIXES, suffix_of, walk_files
from lvm.data.images.sources.remote import has_wildcard, listing_once, match_objects
from lvm.data.images.sources.scene import Failure, SceneInfo

__all__ = ["CodeSource", "Failure", "ImageSource", "SceneInfo", "open_any_source", "open_source"]

KINDS = {  # of the module KIND, imported on first use with the libraries that only it needs
    "generated": "GeneratedSource",
    "folder": "FolderSource",
    "video": "VideoSource",
    "tar": "TarSource",
    "tfds": "TfdsSource",
    "array_record": "ArrayRecordSource",
    "parquet": "ParquetSource",
    "coco": "CocoSource",
    "jsonl": "JsonlSource",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def open_source(spec: str, preprocess: Preprocess, overrides: Mapping[str, Any] | None = None) -> ImageSource:
    """Opens an image source.

    Args:
      spec: a folder: of image files (see `FolderSource` for its layouts), or of videos, tars or another kind, which its
        first file tells; a file or a pattern of files of such a kind; the URL of any of these, such as
        gs://BUCKET/FOLDER or s3://BUCKET/FOLDER/*.tar; or a config file ending in .py whose `get_config()` returns a
        ConfigDict with the `kind` of source and its parameters. With every kind, `derived` names streams that are
        computed from rgb (`lvm.data.streams.derived`), `derived_seed` seeds them.
      preprocess: converts decoded images to the model's size.
      overrides: parameters that replace those of the config file, or the defaults.

    Raises:
      UserError: `spec` is none of these, has a wrong kind, key or value, or holds codes.
    """
    source = open_any_source(spec, preprocess, overrides)
    if not isinstance(source, ImageSource):
        raise UserError(f"{spec}: holds ready codes, not images; only tokenizer.encode takes it")
    try:
        len(source)  # lists all scenes
        source.streams  # noqa: B018 (raises errors of the settings files)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(spec) else f"{spec}: {error}") from error
    return source


def open_any_source(
    spec: str, preprocess: Preprocess, overrides: Mapping[str, Any] | None = None
) -> ImageSource | CodeSource:
    """Opens an `ImageSource` or a `CodeSource` without listing its files; arguments and errors as for `open_source`."""
    if files.is_remote(spec):
        with listing_once():
            return _open(_kind_of_url(spec), preprocess, {**(overrides or {}), "path": spec})
    path, parameters = pathlib.Path(find_config(spec)), dict(overrides or {})
    if path.suffix == ".py" and path.is_file():
        parameters = _load_config(path) | parameters
        kind = parameters.pop("kind", None)
        if kind not in KINDS:
            raise UserError(f"{spec}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        try:
            return _open(kind, preprocess, parameters)
        except UserError as error:
            raise UserError(f"{spec}: {error}") from error
    if path.is_dir():
        kind = _kind_of_first(name for _, name in walk_files(path, lambda path, reason: None))
    elif path.is_file() and suffix_of(path) in COMPRESSED_SUFFIXES:
        kind = "tar"  # whose error says what to do
    elif has_wildcard(spec) and not path.exists() and (names := locate(spec, lambda path, reason: None)[1]):
        kind = _kind_of_first(names)
    elif not path.is_file() or not (kind := _KIND_OF_SUFFIX.get(suffix_of(path))):
        raise UserError(
            f"{spec}: found {'a file' if path.is_file() else 'nothing'} there; expected a folder of images, or a "
            "config file ending in .py with get_config(), such as configs/demo_scenes.py, or a file ending in "
            f"{', '.join(_KIND_OF_SUFFIX)}"
        )
    return _open(kind, preprocess, parameters | {"path": spec})


def _open(kind: str, preprocess: Preprocess, parameters: dict[str, Any]) -> ImageSource | CodeSource:
    derived, seed = parameters.pop("derived", ()), parameters.pop("derived_seed", 0)
    source_class = getattr(importlib.import_module(f"{__name__}.{kind}"), KINDS[kind])
    source = source_class(preprocess, **parameters)
    if not derived:
        return source
    if not isinstance(source, ImageSource):
        raise UserError("derived: streams are computed from images, and this source holds ready codes")
    return DerivedStreams(source, derived, seed)


def _kind_of_url(url: str) -> str:
    _, _, names = match_objects(url)
    if not names:
        raise UserError(f"{url}: found nothing there; expected a folder, a file or a pattern of files")
    return _kind_of_first(names)


def _kind_of_first(names: Iterable[str]) -> str:
    """Returns the kind of the first file that belongs to any."""
    otherwise = "folder"
    for name in names:
        suffix = suffix_of(name)
        if suffix in IMAGE_SUFFIXES:
            return "folder"
        if suffix in _KIND_OF_SUFFIX:
            return _KIND_OF_SUFFIX[suffix]
        if suffix in COMPRESSED_SUFFIXES:
            otherwise = "tar"
    return otherwise  # whose error names what it expects


def _load_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = runpy.run_path(str(path))["get_config"]()
        # A ConfigDict's items are sorted by key; its JSON keeps the order in which streams are named.
        return {k: json.loads(v.to_json()) if isinstance(v, ConfigDict) else v for k, v in config.items()}
    except UserError:
        raise
    except Exception as error:  # the file may raise anything
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; expected a file with a get_config() that returns a ConfigDict"
        ) from error
