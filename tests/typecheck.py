"""Run-time checker of jaxtyping annotations (`--jaxtyping-packages` in pyproject.toml).

Only functions with array annotations are checked: the rest is mypy's.
"""

import re
from typing import Any

from beartype import BeartypeConf, beartype

_ARRAY = re.compile(r"\b(Shaped|Bool|Num|Real|Float|Integer|U?Int|Key)\d*\[")


def check_arrays(function: Any) -> Any:
    """Decorates a function whose annotations name array shapes; returns others as they are."""
    annotations = " ".join(map(str, getattr(function, "__annotations__", {}).values()))
    if not _ARRAY.search(annotations):
        return function
    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))
