"""Typed configuration trees: frozen dataclasses inside, `ml_collections` at the command line.

A config file's `get_config()` returns `to_config_dict(SomeConfig(...))`, so that every key has a default that flags can
override. `from_config_dict` rebuilds the dataclass; it rejects unknown keys, wrong types and impossible values.
"""

import dataclasses
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from lvm.common.errors import UserError

T = TypeVar("T")
_MAX_CHANGES, _MAX_SHOWN = 8, 32  # described changes, and characters of a value


def expand_home(text: str) -> str:
    """Expands `~` at the start of a path, or of each of several joined by `:` or `+`; other text is unchanged.

    Raises:
      UserError: no home folder is known.
    """

    def expand(match: re.Match[str]) -> str:
        home = os.path.expanduser(match[0])
        if home == "~":
            raise UserError(f"{text}: no home folder is known for ~; give the whole path, or set HOME")
        return home

    return re.sub(r"(?:^|(?<=[:+]))~[^/:+]*(?=[/:+]|$)", expand, text)


def find_config(path: str) -> str:
    """`path`, or this package's own `configs/NAME.py` where the working directory has no such file."""
    path = expand_home(path)
    packaged = pathlib.Path(__file__).parents[2] / path
    is_packaged = path.startswith("configs/") and packaged.is_file()
    return str(packaged) if is_packaged and not os.path.exists(path) else path


def to_config_dict(config: Any) -> ConfigDict:
    """Converts a dataclass to a `ConfigDict` with every key; members of a family carry their `kind`."""
    return ConfigDict(to_json(config), convert_dict=True)


def to_json(config: Any) -> Any:
    """Converts a dataclass to plain dicts, tuples and scalars."""
    if dataclasses.is_dataclass(config):
        tree = {name: to_json(getattr(config, name)) for name in _keys(config)}
        kind = getattr(type(config), "kind", None)
        return {"kind": kind, **tree} if kind else tree
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return tuple(to_json(value) for value in config)
    return config


def _keys(config: Any) -> list[str]:
    """The fields of a dataclass that are given; the others follow from them."""
    return [field.name for field in dataclasses.fields(config) if field.init]


def from_config_dict(cls: type[T], values: Any, path: str = "config") -> T:
    """Builds `cls` from nested mappings. Its attribute `absent` has the values of keys that older records lack, if they
    are not the defaults.

    Raises:
      UserError: an unknown key, a wrong type, or a value that the dataclass rejects; names the key from `path` on.
    """
    return _build(cls, values, path)


def _build(annotation: Any, value: Any, path: str) -> Any:
    if isinstance(annotation, type) and hasattr(annotation, "kinds"):
        annotation, value = _member(annotation, value, path)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, path)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path}: {value!r} is not a tuple; a tuple of one is ({value!r},)")
        return tuple(_build(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        items = _mapping(value, path).items()
        return {key: _build(arguments[1], item, f"{path}.{key}") for key, item in items}
    return _scalar(annotation, value, path)


def _member(family: Any, value: Any, path: str) -> tuple[type, dict[str, Any]]:
    fields = dict(_mapping(value, path))
    kind = fields.pop("kind", None)
    if kind not in family.kinds:
        raise UserError(f"{path}.kind: {kind!r} is not one of {', '.join(sorted(family.kinds))}")
    return family.kinds[kind], fields


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys that differ between two JSON objects, with short values: `batch_size: 2 → 3, preprocess.mode: …`."""
    changes = list(_list_changes(old, new, ""))
    return ", ".join(changes[:_MAX_CHANGES]) + (", …" if len(changes) > _MAX_CHANGES else "")


def _list_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _list_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            is_short = max(len(str(before)), len(str(after))) <= _MAX_SHOWN
            yield f"{prefix}{key}: {before} → {after}" if is_short else f"{prefix}{key}"


def _build_dataclass(cls: Any, value: Any, path: str) -> Any:
    values = {**getattr(cls, "absent", {}), **_mapping(value, path)}
    hints = typing.get_type_hints(cls)
    names = _keys(cls)
    for key in values:
        if key not in names:
            kind = f" of kind {cls.kind!r}" if hasattr(cls, "kind") else ""
            raise UserError(f"{path}.{key}: no such key; {path}{kind} has {', '.join(names) or 'no others'}")
    built = {key: _build(hints[key], values[key], f"{path}.{key}") for key in values}
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(f"{path}.{error}") from error
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if isinstance(value, ConfigDict):
        return dict(value.items())
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {value!r} is not a group of keys")
    return value


def _scalar(annotation: Any, value: Any, path: str) -> Any:
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is str and type(value) is str:
        return expand_home(value)
    if annotation is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"{path}: {value} is not a finite number")
    if type(value) is not annotation:
        raise UserError(f"{path}: {value!r} is a {type(value).__name__}, expected {annotation.__name__}")
    return value
