"""Several stores read as one, such as a data set that was encoded in parts: their scenes follow one another."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt16, UInt64

from lvm.common.errors import UserError
from lvm.common.ranges import Range
from lvm.data.store.grid_reads import Damages, Reads, read_intact
from lvm.data.store.jsonl import JsonlStore
from lvm.data.store.reader import Store

SingleStore = Store | JsonlStore


class ConcatStore:
    """The scenes of several stores with the part of `Store`'s interface that mixtures use.

    Classes are matched by name and stream sets by their streams. Scenes of equal groups in different stores are copies
    of one original, as within a store: the split never separates them.

    Args:
      stores: all scene stores or all JSONL files, of one tokenizer; the order is part of the order of data.

    Raises:
      UserError: stores of both kinds.
    """

    def __init__(self, stores: Sequence[SingleStore]):
        self.path = f"{stores[0].path} … {stores[-1].path}"  # for messages
        if len({type(store) for store in stores}) > 1:
            raise UserError(f"{self.path}: scene stores and JSONL files; name them in components of their own")
        self._stores = stores
        self.manifest: dict[str, Any] = {"tokenizer": stores[0].manifest["tokenizer"]}
        self.classes = sorted({name for store in stores for name in store.classes})
        self.stream_sets = sorted({names for store in stores for names in store.stream_sets})
        extremes = [store.group_hashes for store in stores if len(store)]
        self.group_hashes = (min(low for low, _ in extremes), max(high for _, high in extremes)) if extremes else (0, 0)
        self._starts = np.cumsum([0] + [len(store) for store in stores])
        # From each store's ids to the common ones; class id -1, no class, is the last.
        self._class_ids = [np.array([*map(self.classes.index, store.classes), -1], np.int32) for store in stores]
        self._stream_set_ids = [np.array([*map(self.stream_sets.index, s.stream_sets)], np.uint16) for s in stores]
        self._local_set_ids = [_inverse(ids, len(self.stream_sets)) for ids in self._stream_set_ids]
        entry_dtype = stores[0].entries(np.zeros(0, np.int64)).dtype
        self._nested = np.dtype([("entry", entry_dtype), ("store", "<i4")])
        self._flat = np.dtype([*entry_dtype.descr, ("store", "<i4")])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def indexes(self) -> Iterator[Shaped[np.ndarray, " scenes"]]:
        """Index entries of each shard's scenes, store after store."""
        for number, store in enumerate(self._stores):
            for entries in store.indexes:
                yield self._with_common_ids(entries, number)

    @functools.cached_property
    def kinds(self) -> Shaped[np.ndarray, " runs"] | None:
        """See `Store.kinds`."""
        parts = []
        for number, store in enumerate(self._stores):
            if store.kinds is None:
                return None
            parts.append(self._with_common_ids(store.kinds, number))
            parts[-1]["first"] += self._starts[number]
        return np.concatenate(parts)

    def heldout_scenes(self, fraction: float) -> Int64[np.ndarray, " scenes"] | None:
        """See `Store.heldout_scenes`."""
        parts = []
        for store, start in zip(self._stores, self._starts.tolist(), strict=False):
            if not isinstance(store, Store) or (scenes := store.heldout_scenes(fraction, self.group_hashes)) is None:
                return None
            parts.append(start + scenes)
        return np.concatenate(parts)

    def identity(self) -> str:
        """Hash of the stores' identities, in order."""
        return hashlib.sha256("\n".join(store.identity() for store in self._stores).encode()).hexdigest()

    def entries(self, scenes: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        """Looks up scenes, in [0, len): a store's entry and the number of the store."""
        entries = np.empty(len(scenes), self._nested)
        entries["store"] = np.searchsorted(self._starts, scenes, side="right") - 1
        for number, rows in self._by_store(entries["store"]):
            local = self._stores[number].entries(scenes[rows] - self._starts[number])
            entries["entry"][rows] = self._with_common_ids(local, number)
        return entries.view(self._flat)

    def groups(self, scenes: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """See `Store.groups`."""
        groups = np.empty(len(scenes), np.uint64)
        for number, rows in self._by_store(np.searchsorted(self._starts, scenes, side="right") - 1):
            groups[rows] = self._stores[number].groups(scenes[rows] - self._starts[number])
        return groups

    def grids(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> UInt16[np.ndarray, "n N"]:
        """See `Store.grids`."""
        return read_intact(self.reads(entries, frames, streams))

    def reads(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> Reads:
        """See `Store.reads`."""
        nested, parts = entries.view(self._nested), []
        for number, rows in self._by_store(entries["store"]):
            local = nested["entry"][rows]
            local["stream_set"] = self._local_set_ids[number][local["stream_set"]]
            parts.append((rows, self._stores[number].reads(local, frames[rows], streams[rows])))
        height, width = self.manifest["tokenizer"]["grid"]
        return _ConcatReads(parts, len(entries), height * width)

    def _by_store(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each store that occurs, and the indices at which it does."""
        for number in np.unique(numbers).tolist():
            yield number, np.flatnonzero(numbers == number)

    def _with_common_ids(self, entries: np.ndarray, number: int) -> np.ndarray:
        entries = np.array(entries)
        entries["class_id"] = self._class_ids[number][entries["class_id"]]
        entries["stream_set"] = self._stream_set_ids[number][entries["stream_set"]]
        return entries


class _ConcatReads(Reads):
    """The reads of several stores, each with its rows."""

    def __init__(self, parts: Sequence[tuple[np.ndarray, Reads]], count: int, codes_per_image: int):
        self._parts, self._shape = parts, (count, codes_per_image)

    def start(self) -> list[tuple[Range, np.ndarray]]:
        return [part for _, reads in self._parts for part in reads.start()]

    def finish(self) -> tuple[np.ndarray, Damages]:
        codes = np.empty(self._shape, np.uint16)
        damages: dict[str, np.ndarray] = {}
        for rows, reads in self._parts:
            codes[rows], damaged = reads.finish()
            damages |= {message: rows[indices] for message, indices in damaged.items()}
        return codes, damages


def _inverse(ids: np.ndarray, size: int) -> np.ndarray:
    """The index in `ids` of each of [0, size); 0 for those that aren't there, which are never looked up."""
    inverse = np.zeros(size, np.uint16)
    inverse[ids] = np.arange(len(ids))
    return inverse


AnyStore = SingleStore | ConcatStore
