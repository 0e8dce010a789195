"""Which parts of which sentences make row r, by random access: `concat` cuts one stream, `whole` fills rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from lvm.data.mixture.mixture import BLOCK, PERIOD, Mixture

_PAD = -1  # in place of a sentence
_STRIDE = 4096  # blocks between two places whose row is remembered


@dataclasses.dataclass(frozen=True)
class Spans:
    """Parts of sentences, and PAD, one after the other.

    Attributes:
      component_ids: int16 [p], −1 for PAD.
      sentence_ids: int64 [p], the sentence within its component.
      offsets: int64 [p], the first token taken of it.
      lengths: int64 [p], tokens taken.
      segment_ids: int32 [p], the place of the sentence in its row, from 1 on; 0 for PAD and in `concat`.
    """

    component_ids: np.ndarray
    sentence_ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    segment_ids: np.ndarray

    def take(self, part: slice) -> Spans:
        """Some of them that follow each other."""
        return Spans(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Spans]) -> Spans:
        """Those of all parts, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class ConcatPacker:
    """Row r is tokens r·C … r·C+C of the stream of all sentences.

    Args:
      mixture: the sentences.
      lengths: int64 [components], tokens of a sentence.
      context: C.

    Attributes:
      stride: tokens from a row's first to the next one's.
    """

    def __init__(self, mixture: Mixture, lengths: np.ndarray, context: int):
        self._mixture, self._lengths, self.stride = mixture, lengths, context
        self._block_tokens = float(mixture.shares @ lengths) * BLOCK  # on average

    def spans(self, first: int, count: int) -> Spans:
        """What the rows [first, first + count) are made of: together count · C + 1 tokens."""
        start, stop = first * self.stride, (first + count) * self.stride + 1
        blocks = range(self.block_of_row(first), self._find(stop - 1) + 1)
        made = [self._mixture.block(block) for block in blocks]
        components, numbers = (np.concatenate(parts) for parts in zip(*made, strict=True))
        ends = np.cumsum(self._lengths[components]) + self._tokens_before(blocks[0])
        low, high = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left") + 1
        components, numbers, ends = components[low:high], numbers[low:high], ends[low:high]
        starts = ends - self._lengths[components]
        firsts = np.maximum(start - starts, 0)
        lengths = np.minimum(ends, stop) - starts - firsts
        return Spans(components, numbers, firsts, lengths, np.zeros(len(components), np.int32))

    def block_of_row(self, row: int) -> int:
        """The block of the sentence that a row begins in."""
        return self._find(row * self.stride)

    def _find(self, token: int) -> int:
        # No component is ever a sentence away from its share, so the guess is off by a few blocks at most.
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
    """Rows of whole sentences: each block of the mixture is packed by itself, so that a row is found without the
    rows before it being made.

    How many rows a block needs follows from how many sentences of each length it has. These numbers repeat
    after `PERIOD` blocks; up to there they are counted when they are first asked for, at some million blocks a
    second, and every `_STRIDE`-th is kept.

    Args, attributes: as `ConcatPacker`, a row being C + 1 tokens by itself; no length is above C + 1.
    """

    def __init__(self, mixture: Mixture, lengths: np.ndarray, context: int):
        self._mixture, self._capacity, self.stride = mixture, context + 1, context + 1
        self._lengths, self._kinds = np.unique(lengths, return_inverse=True)  # [kinds], [components]
        self._rows_before = [0]  # of the blocks 0, _STRIDE, 2 · _STRIDE …

    def spans(self, first: int, count: int) -> Spans:
        """What the rows [first, first + count) are made of: together count · (C + 1) tokens."""
        parts = []
        while count:
            block, row = self._find(first)
            made, starts = self._block(block)
            rows = min(count, len(starts) - 1 - row)
            parts.append(made.take(slice(starts[row], starts[row + rows])))
            first, count = first + rows, count - rows
        return Spans.join(parts)

    def block_of_row(self, row: int) -> int:
        """The block that a row belongs to."""
        return self._find(row)[0]

    def _find(self, row: int) -> tuple[int, int]:
        """The block of a row, and its place there."""
        before = self._count_rows(row)
        cycle, row = divmod(row, before[-1]) if row >= before[-1] else (0, row)
        stretch = int(np.searchsorted(before, row, side="right")) - 1
        row -= before[stretch]
        ends = np.cumsum(self._row_counts(stretch))
        block = int(np.searchsorted(ends, row, side="right"))
        row -= int(ends[block - 1]) if block else 0
        return cycle * PERIOD + stretch * _STRIDE + block, row

    def _count_rows(self, row: int) -> list[int]:
        """Rows before every `_STRIDE`-th block, up to `row` or for the whole period."""
        before = self._rows_before
        if before[-1] <= row and len(before) <= PERIOD // _STRIDE:
            before = list(before)  # other threads may read the list as it was
            while before[-1] <= row and len(before) <= PERIOD // _STRIDE:
                before.append(before[-1] + int(self._row_counts(len(before) - 1).sum()))
            self._rows_before = before
        return before

    @functools.lru_cache(maxsize=8)  # noqa: B019 (it lives as long as its process)
    def _row_counts(self, stretch: int) -> np.ndarray:
        """Rows of each of the `_STRIDE` blocks from stretch · `_STRIDE` on: int64 [`_STRIDE`]."""
        counts = self._mixture.block_counts(stretch * _STRIDE, (stretch + 1) * _STRIDE)
        by_kind = np.stack([counts[:, self._kinds == kind].sum(1) for kind in range(len(self._lengths))], 1)
        # Few blocks differ. As one number each they are told apart sooner, where seven digits are enough.
        digits = (BLOCK + 1) ** np.arange(len(self._lengths)) if len(self._lengths) <= 7 else None
        keys, axis = (by_kind, 0) if digits is None else (by_kind @ digits, None)
        _, first, which = np.unique(keys, axis=axis, return_index=True, return_inverse=True)
        rows = [len(self._bins(tuple(numbers))) for numbers in by_kind[first].tolist()]
        return np.array(rows)[which.reshape(-1)]

    def _bins(self, counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return best_fit(counts, tuple(self._lengths.tolist()), self._capacity)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _block(self, block: int) -> tuple[Spans, np.ndarray]:
        """What the rows of a block are made of, in a seeded order; the first piece of each, int64 [rows + 1]."""
        components, numbers = self._mixture.block(block)
        kinds = self._kinds[components]
        waiting = [np.flatnonzero(kinds == kind).tolist() for kind in range(len(self._lengths))]
        bins = self._bins(tuple(len(places) for places in waiting))
        rows = [[waiting[kind].pop() for kind in bin] for bin in bins]
        rest = [self._capacity - int(sum(self._lengths[list(bin)])) for bin in bins]
        order = np.random.default_rng([self._mixture.seed, block, 1]).permutation(len(rows)).tolist()
        # The sentences of each row, by their place in the block.
        padded = [rows[i] + [_PAD] * (rest[i] > 0) for i in order]
        starts = np.cumsum([0, *map(len, padded)])
        places = np.concatenate([np.array(row) for row in padded])
        is_pad = places == _PAD
        lengths = self._lengths[kinds[places]]
        lengths[is_pad] = [rest[i] for i in order if rest[i] > 0]
        segments = np.arange(1, len(places) + 1) - np.repeat(starts[:-1], np.diff(starts))
        return Spans(
            np.where(is_pad, -1, components[places]).astype(np.int16),
            np.where(is_pad, 0, numbers[places]),
            np.zeros(len(places), np.int64),
            lengths,
            np.where(is_pad, 0, segments).astype(np.int32),
        ), starts


@functools.lru_cache(maxsize=4096)
def best_fit(counts: tuple[int, ...], lengths: tuple[int, ...], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Packs `counts[k]` things of `lengths[k]` each: longest first, each where it leaves the least room.

    Returns:
      For every bin the k of each thing in it.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for kind in sorted(range(len(lengths)), key=lambda kind: -lengths[kind]):
        for _ in range(counts[kind]):
            fitting = [(left, place) for place, left in enumerate(room) if left >= lengths[kind]]
            if not fitting:
                bins.append([])
                room.append(capacity)
            place = min(fitting)[1] if fitting else len(bins) - 1
            bins[place].append(kind)
            room[place] -= lengths[kind]
    return tuple(map(tuple, bins))
