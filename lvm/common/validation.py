"""Checks of configuration fields. Messages begin with `field=value`; `from_config_dict` puts the path before it."""

from collections.abc import Collection
from typing import Any

from lvm.common.errors import UserError


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError unless each named field of `config` is above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{name}={getattr(config, name)!r} must be positive")


def check_non_negative(config: Any, *names: str) -> None:
    """Raises UserError unless each named field of `config` is at least 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{name}={getattr(config, name)!r} must not be negative")


def check_choice(config: Any, name: str, choices: Collection[Any]) -> None:
    """Raises UserError unless the named field of `config` is one of `choices`."""
    if getattr(config, name) not in choices:
        raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(map(str, choices))}")


def check_tuples(config: Any, *names: str) -> None:
    """Raises UserError for a value that is not a tuple, such as a string where several are expected."""
    for name in names:
        if not isinstance(value := getattr(config, name), tuple):
            raise UserError(f"{name}={value!r} must be a tuple; a tuple of one is ({value!r},)")
