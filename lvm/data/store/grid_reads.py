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

    Grids that follow each other both in the request and in a shard are a run. Runs that don't meet in a shard are read
    to their place in the result; if some do, they are read together, and all grids are copied to their place. Grids
    between are never read: on local disk, too, that costs more than the calls that it saves.

    Args:
      shards: of the store.
      numbers, grids: int [n], the shard and the position in it.
      codes_per_image: N.
    """

    def __init__(
        self, shards: Shards, numbers: Int[np.ndarray, " n"], grids: Int[np.ndarray, " n"], codes_per_image: int
    ):
        self._shards, self._N = shards, codes_per_image
        keys = numbers.astype(np.int64) * _MAX_GRIDS + grids
        runs = np.flatnonzero(np.diff(keys, prepend=-2) != 1)
        run_keys, sizes = keys[runs], np.diff(runs, append=len(keys))
        order = np.argsort(run_keys)
        firsts, ends = run_keys[order], (run_keys + sizes)[order]
        reach = np.maximum.accumulate(ends)
        is_start = np.append(True, firsts[1:] > reach[:-1])[: len(runs)]  # of a read
        self._is_in_order = bool(is_start.all())
        if self._is_in_order:
            offsets, self._rows = runs[order], np.arange(len(keys))
        else:
            starts = np.flatnonzero(is_start)
            firsts, ends = firsts[starts], reach[np.append(starts[1:], len(reach)) - 1]
            offsets = np.cumsum(ends - firsts) - (ends - firsts)
            reads = np.searchsorted(firsts, run_keys, side="right") - 1
            self._rows = np.arange(len(keys)) + np.repeat(run_keys - firsts[reads] + offsets[reads] - runs, sizes)
        self._reads = firsts, ends - firsts, offsets
        self._keys = np.empty((ends - firsts).sum(), np.int64)  # of the rows of `_content`
        self._keys[self._rows] = keys
        self._content = np.empty((len(self._keys), format.grid_bytes(codes_per_image)), np.uint8)

    def start(self) -> list[tuple[Range, np.ndarray]]:
        firsts, counts, offsets = self._reads
        numbers, grids = np.divmod(firsts, _MAX_GRIDS)
        reads = zip(numbers.tolist(), grids.tolist(), counts.tolist(), offsets.tolist(), strict=True)
        if self._shards.is_remote:
            return [(self._shards[i].codes_range(grid, n), self._content[row : row + n]) for i, grid, n, row in reads]
        buffer, size = self._content.reshape(-1).data, self._content.shape[1]
        for i, grid, count, row in reads:
            self._shards[i].read_into(buffer[row * size : (row + count) * size], grid)
        return []

    def finish(self) -> tuple[np.ndarray, Damages]:
        damaged = self._damaged()
        if damaged and self._shards.is_remote:  # by the network?
            _fill([self._part(row) for row in damaged])
            damaged = self._damaged()
        codes = self._content.view("<u2")[:, : self._N]
        damages = {self._message(row): np.flatnonzero(self._rows == row) for row in damaged}
        return codes if self._is_in_order else codes[self._rows], damages

    def _damaged(self) -> list[int]:
        """Rows of `_content`."""
        return format.damaged_grids(self._content, (self._keys % _MAX_GRIDS).tolist())

    def _part(self, row: int) -> tuple[Range, np.ndarray]:
        number, grid = divmod(int(self._keys[row]), _MAX_GRIDS)
        return self._shards[number].codes_range(grid, 1), self._content[row : row + 1]

    def _message(self, row: int) -> str:
        number, grid = divmod(int(self._keys[row]), _MAX_GRIDS)
        return str(self._shards[number].damage(grid))
