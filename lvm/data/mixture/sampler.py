"""Which scenes make the sentences of an epoch: each scene once, in a new seeded order, by random access."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lvm.data.mixture.permutation import permute_each, shuffle_indices

_WORD = 64
_CHUNK = 2**20  # scenes whose index is looked at at once


class RankIndex:
    """The scenes that fulfil a condition, found by rank; a quarter of a byte a scene is all that it keeps.

    Args:
      parts: entries of the index, part after part.
      keep: entries [n] → bool [n].
    """

    def __init__(self, parts: Iterable[np.ndarray], keep: Callable[[np.ndarray], np.ndarray]):
        packed, self._total = [np.zeros(0, np.uint8)], 0
        waiting = np.zeros(0, bool)  # what doesn't fill a byte yet
        for chunk in split_chunks(parts):
            self._total += len(chunk)
            waiting = np.concatenate([waiting, keep(chunk)])
            whole = len(waiting) // 8 * 8
            packed.append(np.packbits(waiting[:whole]))
            waiting = waiting[whole:]
        bits = np.concatenate([*packed, np.packbits(waiting)])
        self._words = np.pad(bits, (0, -len(bits) % (_WORD // 8))).reshape(-1, _WORD // 8)
        counts = np.bitwise_count(self._words).sum(axis=1, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])  # [words + 1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """The numbers of the scenes of these ranks, int64 as `ranks`, each in [0, len)."""
        if len(self) == self._total:
            return ranks
        flat = ranks.ravel()
        words = np.searchsorted(self._starts, flat, side="right") - 1
        bits = np.unpackbits(self._words[words], axis=1)  # [n, 64]
        reached = np.cumsum(bits, axis=1, dtype=np.uint8) > (flat - self._starts[words])[:, None]
        return (words * _WORD + np.argmax(reached, axis=1)).reshape(ranks.shape)


def split_chunks(parts: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """The same entries in chunks that fit in memory."""
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            yield part[start : start + _CHUNK]


class SceneSampler:
    """Sentences of k scenes each, whatever their classes.

    Args:
      scenes: those to draw from.
      num_scenes: k.
      seed, shuffle: of the order (`permutation.SHUFFLES`).

    Attributes:
      sentences_per_epoch: sentences an epoch; the fewer than k scenes that are left over are others in every epoch.
      num_excluded: scenes that no epoch takes.
    """

    num_excluded = 0

    def __init__(self, scenes: RankIndex, num_scenes: int, seed: int, shuffle: str):
        self._scenes, self._k, self._seed, self._shuffle = scenes, num_scenes, seed, shuffle
        self.sentences_per_epoch = len(scenes) // num_scenes

    def scenes(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Scene numbers of the sentences at `places` of an epoch: int64 [n] → [n, k]."""
        each = places[:, None] * self._k + np.arange(self._k)
        return self._scenes.select(
            shuffle_indices(each, len(self._scenes), self._seed + epoch, self._shuffle)
        )


class ClassSampler:
    """Sentences of k scenes of one class each. Classes of fewer than k are left out.

    Keeps 8 bytes a scene, since a class may lie anywhere. Args, attributes: as `SceneSampler`, and

      classes_of: scene numbers [n] → class ids [n].
    """

    def __init__(
        self,
        scenes: RankIndex,
        classes_of: Callable[[np.ndarray], np.ndarray],
        num_scenes: int,
        seed: int,
        shuffle: str,
    ):
        self._k, self._seed, self._shuffle = num_scenes, seed, shuffle
        numbers = scenes.select(np.arange(len(scenes)))
        classes = classes_of(numbers)
        self._members = numbers[np.argsort(classes, kind="stable")]
        _, sizes = np.unique(classes, return_counts=True)
        self.largest = int(sizes.max(initial=0))
        enough = sizes >= num_scenes
        self.num_excluded = int(sizes[~enough].sum())
        self._sizes, self._firsts = sizes[enough], (np.cumsum(sizes) - sizes)[enough]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes // num_scenes)])  # in sentences
        self.sentences_per_epoch = int(self._starts[-1])

    def scenes(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Scene numbers of the sentences at `places` of an epoch: int64 [n] → [n, k]."""
        sentences = shuffle_indices(
            places, self.sentences_per_epoch, self._seed + epoch, self._shuffle, self._k
        )
        classes = np.searchsorted(self._starts, sentences, side="right") - 1
        each = (sentences - self._starts[classes])[:, None] * self._k + np.arange(self._k)
        which = np.repeat(classes, self._k)
        ranks = permute_each(each.ravel(), self._sizes[which], self._seed + epoch, which)
        return self._members[self._firsts[which] + ranks].reshape(each.shape)
