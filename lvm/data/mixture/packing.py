"""Packing of sentences into rows, with random access: `concat` cuts one stream, `whole` bin-packs whole sentences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16, Int32, Int64

from lvm.data.mixture.mixture import BLOCK, PERIOD, Mixture

_PAD = -1  # in place of a sentence
_RANGE = 4096  # blocks between two whose number of preceding rows is stored


@dataclasses.dataclass(frozen=True)
class Spans:
    """Consecutive spans of tokens, each of one sentence or of PAD.

    Attributes:
      component_ids: −1 for PAD.
      sentence_ids: index of the sentence within its component.
      offsets: first token taken of the sentence.
      lengths: tokens taken.
      segment_ids: index of the sentence in its row, from 1 on; 0 for PAD and in `concat`.
    """

    component_ids: Int16[np.ndarray, " p"]
    sentence_ids: Int64[np.ndarray, " p"]
    offsets: Int64[np.ndarray, " p"]
    lengths: Int64[np.ndarray, " p"]
    segment_ids: Int32[np.ndarray, " p"]

    def __getitem__(self, index: slice) -> Spans:
        return Spans(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Spans]) -> Spans:
        """The spans of all parts, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class ConcatPacker:
    """Cuts rows from the stream of all sentences: row r is its tokens r·C … r·C+C.

    Args:
      mixture: the sentences.
      lengths: tokens in a sentence of each component.
      context: C.

    Attributes:
      stride: tokens from the start of a row to that of the next.
    """

    def __init__(self, mixture: Mixture, lengths: Int64[np.ndarray, " components"], context: int):
        self._mixture, self._lengths, self.stride = mixture, lengths, context
        self._block_tokens = float(mixture.shares @ lengths) * BLOCK  # on average

    def spans(self, first: int, count: int) -> Spans:
        """The spans of the rows [first, first + count): count · C + 1 tokens."""
        start, stop = first * self.stride, (first + count) * self.stride + 1
        blocks = range(self.block_of_row(first), self._block_of_token(stop - 1) + 1)
        columns = zip(*(self._mixture.block(block) for block in blocks), strict=True)
        component_ids, sentence_ids = (np.concatenate(column) for column in columns)
        ends = np.cumsum(self._lengths[component_ids]) + self._tokens_before(blocks[0])
        low, high = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left") + 1
        component_ids, sentence_ids, ends = component_ids[low:high], sentence_ids[low:high], ends[low:high]
        starts = ends - self._lengths[component_ids]
        offsets = np.maximum(start - starts, 0)
        lengths = np.minimum(ends, stop) - starts - offsets
        return Spans(component_ids, sentence_ids, offsets, lengths, np.zeros(len(component_ids), np.int32))

    def block_of_row(self, row: int) -> int:
        """The block of the first sentence in a row."""
        return self._block_of_token(row * self.stride)

    def _block_of_token(self, token: int) -> int:
        # Every component is within two sentences of its share, so the guess is off by a few blocks at most.
        block = int(token / self._block_tokens)
        while self._tokens_before(block) > token:
            block -= 1
        while self._tokens_before(block + 1) <= token:
            block += 1
        return block

    def _tokens_before(self, block: int) -> int:
        counts = self._mixture.sentences_before(block)
        return sum(count * int(length) for count, length in zip(counts, self._lengths, strict=True))


class BestFitPacker:
    """Packs whole sentences into rows of C + 1 tokens, block by block of the mixture, by best-fit decreasing.

    The number of rows of a block depends only on how many sentences of each length it has. These counts repeat after
    `PERIOD` blocks; up to there they are computed on demand, some million blocks a second, and the sum is stored for
    every `_RANGE`-th block.

    Args and attributes are `ConcatPacker`'s; no length exceeds C + 1.
    """

    def __init__(self, mixture: Mixture, lengths: Int64[np.ndarray, " components"], context: int):
        self._mixture, self._capacity, self.stride = mixture, context + 1, context + 1
        self._lengths, self._kinds = np.unique(lengths, return_inverse=True)  # [kinds], [components]
        self._rows_before = [0]  # of the blocks 0, _RANGE, 2 · _RANGE …

    def spans(self, first: int, count: int) -> Spans:
        """The spans of the rows [first, first + count): count · (C + 1) tokens."""
        parts = []
        while count:
            block, row = self._locate(first)
            spans, starts = self._pack_block(block)
            num_rows = min(count, len(starts) - 1 - row)
            parts.append(spans[starts[row] : starts[row + num_rows]])
            first, count = first + num_rows, count - num_rows
        return Spans.concatenate(parts)

    def block_of_row(self, row: int) -> int:
        """The block that a row is packed from."""
        return self._locate(row)[0]

    def _locate(self, row: int) -> tuple[int, int]:
        """The block of a row, and the row's index in it."""
        before = self._count_rows(row)
        cycle, row = divmod(row, before[-1]) if row >= before[-1] else (0, row)
        index = int(np.searchsorted(before, row, side="right")) - 1
        row -= before[index]
        ends = np.cumsum(self._row_counts(index))
        block = int(np.searchsorted(ends, row, side="right"))
        row -= int(ends[block - 1]) if block else 0
        return cycle * PERIOD + index * _RANGE + block, row

    def _count_rows(self, row: int) -> list[int]:
        """Rows before every `_RANGE`-th block, up to `row` or for the whole period."""
        before = self._rows_before
        if before[-1] <= row and len(before) <= PERIOD // _RANGE:
            before = list(before)  # other threads may be reading the list
            while before[-1] <= row and len(before) <= PERIOD // _RANGE:
                before.append(before[-1] + int(self._row_counts(len(before) - 1).sum()))
            self._rows_before = before
        return before

    @functools.lru_cache(maxsize=8)  # noqa: B019 (lives as long as its process)
    def _row_counts(self, index: int) -> np.ndarray:
        """Rows of each of the `_RANGE` blocks from index · `_RANGE` on: int64 [`_RANGE`]."""
        counts = self._mixture.block_counts(index * _RANGE, (index + 1) * _RANGE)
        by_kind = np.stack([counts[:, self._kinds == kind].sum(1) for kind in range(len(self._lengths))], 1)
        # Few blocks differ. Counts encoded as one integer are faster to compare; int64 has room for seven.
        digits = (BLOCK + 1) ** np.arange(len(self._lengths)) if len(self._lengths) <= 7 else None
        keys, axis = (by_kind, 0) if digits is None else (by_kind @ digits, None)
        _, first, inverse = np.unique(keys, axis=axis, return_index=True, return_inverse=True)
        rows = [len(self._bins(tuple(counts))) for counts in by_kind[first].tolist()]
        return np.array(rows)[inverse.reshape(-1)]

    def _bins(self, counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return best_fit(counts, tuple(self._lengths.tolist()), self._capacity)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _pack_block(self, block: int) -> tuple[Spans, np.ndarray]:
        """The spans of a block's rows, in a seeded order, and the index of each row's first one, int64 [rows + 1]."""
        component_ids, sentence_ids = self._mixture.block(block)
        kinds = self._kinds[component_ids]
        pending = [np.flatnonzero(kinds == kind).tolist() for kind in range(len(self._lengths))]
        bins = self._bins(tuple(map(len, pending)))
        rows = [[pending[kind].pop() for kind in bin] for bin in bins]  # indices into the block
        room = [self._capacity - int(sum(self._lengths[list(bin)])) for bin in bins]
        order = np.random.default_rng([self._mixture.seed, block, 1]).permutation(len(rows)).tolist()
        padded = [rows[i] + [_PAD] * (room[i] > 0) for i in order]
        starts = np.cumsum([0, *map(len, padded)])
        indices = np.concatenate([np.array(row) for row in padded])
        is_pad = indices == _PAD
        lengths = self._lengths[kinds[indices]]
        lengths[is_pad] = [room[i] for i in order if room[i] > 0]
        segment_ids = np.arange(1, len(indices) + 1) - np.repeat(starts[:-1], np.diff(starts))
        return Spans(
            np.where(is_pad, -1, component_ids[indices]).astype(np.int16),
            np.where(is_pad, 0, sentence_ids[indices]),
            np.zeros(len(indices), np.int64),
            lengths,
            np.where(is_pad, 0, segment_ids).astype(np.int32),
        ), starts


@functools.lru_cache(maxsize=4096)
def best_fit(counts: tuple[int, ...], lengths: tuple[int, ...], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Best-fit-decreasing bin packing of `counts[k]` items of `lengths[k]` each.

    Returns:
      For every bin the k of each of its items.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for kind in sorted(range(len(lengths)), key=lambda kind: -lengths[kind]):
        for _ in range(counts[kind]):
            fitting = [(left, index) for index, left in enumerate(room) if left >= lengths[kind]]
            if not fitting:
                bins.append([])
                room.append(capacity)
            index = min(fitting)[1] if fitting else len(bins) - 1
            bins[index].append(kind)
            room[index] -= lengths[kind]
    return tuple(map(tuple, bins))
