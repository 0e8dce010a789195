"""Failures of a shard: a list beside it, one JSON object a line, and counts by reason in its entry and the manifest."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from lvm.common import files

FAILURES_SUFFIX = ".failures.jsonl"
OTHER = "other reasons"
_MAX_REASONS, _MAX_LENGTH = 32, 120
# Parts of a reason that differ from item to item, most specific first: quoted names, paths, numbers.
_VARIABLE = [
    (re.compile(r"'[^']*'|\"[^\"]*\""), "…"),
    (re.compile(r"\S*/\S*"), "…"),
    (re.compile(r"0x\w+|\d[\d.,]*"), "#"),
]


def to_lines(failures: Iterable[Mapping[str, str]]) -> bytes:
    """The list of failures {"key", "reason"}."""
    return "".join(json.dumps(failure, sort_keys=True) + "\n" for failure in failures).encode()


def read(folder: epath.PathLike) -> Iterator[dict[str, str]]:
    """Yields the failures {"key", "reason"} of a store, shard after shard."""
    for name in sorted(name for name in files.sizes(folder) if name.endswith(FAILURES_SUFFIX)):
        yield from map(json.loads, files.read_bytes(epath.Path(folder) / name).splitlines())


def normalize(reason: str) -> str:
    """A reason without names, paths and numbers, so that equal causes count as one."""
    for pattern, replacement in _VARIABLE:
        reason = pattern.sub(replacement, reason)
    return reason[:_MAX_LENGTH]


def most_common(counts: Counter[str]) -> dict[str, int]:
    """The counts of the most common reasons, and of all others under one name: their number stays bounded."""
    ranked = sorted((item for item in counts.items() if item[0] != OTHER), key=lambda item: (-item[1], item[0]))
    common = dict(ranked[:_MAX_REASONS])
    rest = counts.total() - sum(common.values())
    return common | ({OTHER: rest} if rest else {})


def count(failures: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Counts failures by normalized reason."""
    return most_common(Counter(normalize(failure["reason"]) for failure in failures))


def describe(folder: epath.PathLike, counts: Mapping[str, int]) -> list[str]:
    """Lines for a summary: the number of failures, where they are listed, and each reason's count; none of none."""
    if not counts:
        return []
    lines = [f"{sum(counts.values()):,} failures, listed in {epath.Path(folder) / f'*{FAILURES_SUFFIX}'}:"]
    return lines + [f"  {count:,} × {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])]
