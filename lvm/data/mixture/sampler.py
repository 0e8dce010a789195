"""Sampling of scenes for sentences: each scene once an epoch, in a new seeded order, with random access."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int, Int64

from lvm.data.mixture.permutation import permute_each, shuffle_indices

_WORD = 64
_CHUNK = 2**20  # index entries processed at once


class RankIndex:
    """Selects, by rank, the scenes that satisfy a predicate; takes two bits a scene.

    Args:
      indexes: arrays of index entries, shard after shard.
      predicate: entries [n] → bool [n].
    """

    def __init__(self, indexes: Iterable[np.ndarray], predicate: Callable[[np.ndarray], np.ndarray]):
        packed, self._total = [np.zeros(0, np.uint8)], 0
        pending = np.zeros(0, bool)  # less than a byte
        for chunk in split_chunks(indexes):
            self._total += len(chunk)
            pending = np.concatenate([pending, predicate(chunk)])
            full = len(pending) // 8 * 8
            packed.append(np.packbits(pending[:full]))
            pending = pending[full:]
        bits = np.concatenate([*packed, np.packbits(pending)])
        self._words = np.pad(bits, (0, -len(bits) % (_WORD // 8))).reshape(-1, _WORD // 8)
        counts = np.bitwise_count(self._words).sum(axis=1, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])  # [words + 1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def select(self, ranks: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The indices of the selected scenes at `ranks`, each in [0, len)."""
        if len(self) == self._total:
            return ranks
        flat = ranks.ravel()
        words = np.searchsorted(self._starts, flat, side="right") - 1
        bits = np.unpackbits(self._words[words], axis=1)  # [n, 64]
        reached = np.cumsum(bits, axis=1, dtype=np.uint8) > (flat - self._starts[words])[:, None]
        return (words * _WORD + np.argmax(reached, axis=1)).reshape(ranks.shape)


class RunIndex:
    """Selects scenes by rank from runs of consecutive ones; takes 16 bytes a run.

    Args:
      firsts, counts: int64 [runs], the first scene and the number of scenes of each run, ascending.
    """

    def __init__(self, firsts: Int64[np.ndarray, " runs"], counts: Int64[np.ndarray, " runs"]):
        self._ends = np.cumsum(counts)
        self._offsets = firsts - (self._ends - counts)  # from ranks to scenes

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def select(self, ranks: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The scenes at `ranks`, each in [0, len)."""
        return ranks + self._offsets[np.searchsorted(self._ends, ranks, side="right")]

    @classmethod
    def within(
        cls, firsts: Int64[np.ndarray, " runs"], counts: Int64[np.ndarray, " runs"], scenes: Int64[np.ndarray, " n"],
        *, inverse: bool,
    ) -> "RunIndex":  # fmt: skip
        """The scenes of these runs that are among `scenes`, ascending, or with `inverse` that aren't."""
        run = np.searchsorted(firsts, scenes, side="right") - 1
        inside = scenes[(run >= 0) & (scenes < (firsts + counts)[run])] if len(firsts) else scenes[:0]
        if not inverse:
            return cls(inside, np.ones_like(inside))
        starts, ends = np.sort(np.append(firsts, inside + 1)), np.sort(np.append(firsts + counts, inside))
        is_empty = starts == ends
        return cls(starts[~is_empty], (ends - starts)[~is_empty])


def split_chunks(indexes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields all entries in chunks that fit in memory."""
    for index in indexes:
        for start in range(0, len(index), _CHUNK):
            yield index[start : start + _CHUNK]


class SceneSampler:
    """Samples k scenes of any class for each sentence.

    Args:
      scenes: the usable scenes.
      num_scenes: k.
      seed, shuffle: of the order (`permutation.SHUFFLES`).

    Attributes:
      sentences_per_epoch: the remainder of fewer than k scenes differs from epoch to epoch.
      num_excluded: scenes in no epoch.
    """

    num_excluded = 0

    def __init__(self, scenes: RankIndex | RunIndex, num_scenes: int, seed: int, shuffle: str):
        self._scenes, self._k, self._seed, self._shuffle = scenes, num_scenes, seed, shuffle
        self.sentences_per_epoch = len(scenes) // num_scenes

    def sample(self, sentences: Int[np.ndarray, " n"], epoch: int) -> Int64[np.ndarray, "n k"]:
        """The scenes of the sentences at these indices of an epoch."""
        ranks = sentences[:, None] * self._k + np.arange(self._k)
        order = shuffle_indices(ranks, len(self._scenes), self._seed + epoch, self._shuffle)
        return self._scenes.select(order)


class ClassSampler:
    """Samples k scenes of one class for each sentence. Excludes classes of fewer than k scenes.

    Takes 8 bytes a scene, since the scenes of a class may be anywhere. Args and attributes are `SceneSampler`'s, and

      class_ids: scene indices [n] → class ids [n].
      largest_class: scenes of the largest class.
    """

    def __init__(
        self,
        scenes: RankIndex | RunIndex,
        class_ids: Callable[[np.ndarray], np.ndarray],
        num_scenes: int,
        seed: int,
        shuffle: str,
    ):
        self._k, self._seed, self._shuffle = num_scenes, seed, shuffle
        indices = scenes.select(np.arange(len(scenes)))
        classes = class_ids(indices)
        self._members = indices[np.argsort(classes, kind="stable")]  # by class
        _, sizes = np.unique(classes, return_counts=True)
        self.largest_class = int(sizes.max(initial=0))
        usable = sizes >= num_scenes
        self.num_excluded = int(sizes[~usable].sum())
        self._sizes, self._offsets = sizes[usable], (np.cumsum(sizes) - sizes)[usable]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes // num_scenes)])  # in sentences
        self.sentences_per_epoch = int(self._starts[-1])

    def sample(self, sentences: Int[np.ndarray, " n"], epoch: int) -> Int64[np.ndarray, "n k"]:
        """The scenes of the sentences at these indices of an epoch."""
        seed = self._seed + epoch
        order = shuffle_indices(sentences, self.sentences_per_epoch, seed, self._shuffle, self._k)
        classes = np.searchsorted(self._starts, order, side="right") - 1
        ranks = (order - self._starts[classes])[:, None] * self._k + np.arange(self._k)
        repeated = np.repeat(classes, self._k)
        permuted = permute_each(ranks.ravel(), self._sizes[repeated], seed, repeated)
        return self._members[self._offsets[repeated] + permuted].reshape(ranks.shape)
