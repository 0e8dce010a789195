"""Reads of single grids, planned by store and done for all stores of a batch at once."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8, UInt16

from lvm.common.ranges import Range
from lvm.data.store import format
from lvm.data.store.format import DamagedError
from lvm.data.store.shards import Shards, fetch

_MAX_GRIDS = 2**32  # of a shard; shard · this + grid is a key that sorts by both
_MAX_GAP = 16  # grids between two others that are cheaper to read than to skip, on local disk
Damages = Mapping[str, Int[np.ndarray, " k"]]  # message of each damaged grid → the requested rows that need it


class Reads(abc.ABC):
    """Planned reads of n grids."""

    @abc.abstractmethod
    def start(self) -> list[tuple[Range, UInt8[np.ndarray, "count bytes"]]]:
        """Reads what is on local disk; returns the ranges to fetch, each with the array that it fills."""

    @abc.abstractmethod
    def finish(self) -> tuple[UInt16[np.ndarray, "n N"], Damages]:
        """Checks what was read; returns the codes, and which of them are damaged."""


def read_all(plans: Sequence[Reads]) -> list[tuple[UInt16[np.ndarray, "n N"], Damages]]:
    """Does the reads of all plans, those from object storage in one call."""
    parts = [part for plan in plans for part in plan.start()]
    _fill(parts)
    return [plan.finish() for plan in plans]


def read_intact(plan: Reads) -> UInt16[np.ndarray, "n N"]:
    """Does the reads of one plan. Raises DamagedError; names shard, scene and frame."""
    ((codes, damages),) = read_all([plan])
    if damages:
        raise DamagedError(next(iter(damages)))
    return codes


def _fill(parts: Sequence[tuple[Range, np.ndarray]]) -> None:
    for (_, target), content in zip(parts, fetch([part for part, _ in parts]), strict=True):
        target.reshape(-1)[:] = np.frombuffer(content, np.uint8)


class GridReads(Reads):
    """Reads of grids of one store, by shard and position in it; each grid is read and checked once.

    Args:
      shards: of the store.
      numbers, grids: int [n], the shard and the position in it.
      codes_per_image: N.
    """

    def __init__(
        self, shards: Shards, numbers: Int[np.ndarray, " n"], grids: Int[np.ndarray, " n"], codes_per_image: int
    ):
        self._shards, self._N = shards, codes_per_image
        keys, self._inverse = np.unique(numbers.astype(np.int64) * _MAX_GRIDS + grids, return_inverse=True)
        max_step = 1 if shards.is_remote else 1 + _MAX_GAP
        is_start = np.diff(keys, prepend=-_MAX_GRIDS) > max_step  # of a read; it ends before a gap
        starts = np.flatnonzero(is_start)
        firsts, lasts = keys[starts], keys[np.append(starts[1:], len(keys))[: len(starts)] - 1]
        ends = np.cumsum(lasts - firsts + 1)  # of the reads, in `_content`
        self._reads = firsts, lasts - firsts + 1, ends
        self._numbers, self._grids = np.divmod(keys, _MAX_GRIDS)
        runs = np.cumsum(is_start) - 1
        self._rows = keys + (ends - lasts - 1)[runs]  # of the grids, in `_content`
        self._content = np.empty((int(ends[-1]) if len(ends) else 0, format.grid_bytes(codes_per_image)), np.uint8)

    def start(self) -> list[tuple[Range, np.ndarray]]:
        firsts, counts, ends = self._reads
        numbers, grids = np.divmod(firsts, _MAX_GRIDS)
        parts = map(self._content.__getitem__, map(slice, (ends - counts).tolist(), ends.tolist()))
        ranges = []
        for number, grid, part in zip(numbers.tolist(), grids.tolist(), parts, strict=True):
            shard = self._shards[number]
            if shard.is_remote:
                ranges.append((shard.codes_range(grid, len(part)), part))
            else:
                shard.read_into(part, grid)
        return ranges

    def finish(self) -> tuple[np.ndarray, Damages]:
        damaged = self._damaged()
        if damaged and self._shards.is_remote:  # by the network?
            _fill([self._part(i) for i in damaged])
            damaged = self._damaged()
        codes = self._content.view("<u2")[:, : self._N][self._rows[self._inverse]]
        return codes, {self._message(i): np.flatnonzero(self._inverse == i) for i in damaged}

    def _damaged(self) -> list[int]:
        has_gaps = len(self._rows) < len(self._content)
        return format.damaged_grids(self._content[self._rows] if has_gaps else self._content, self._grids.tolist())

    def _part(self, i: int) -> tuple[Range, np.ndarray]:
        row = int(self._rows[i])
        return self._shards[int(self._numbers[i])].codes_range(int(self._grids[i]), 1), self._content[row : row + 1]

    def _message(self, i: int) -> str:
        return str(self._shards[int(self._numbers[i])].damage(int(self._grids[i])))
