"""Random numbers by random access: each is a hash of where it stands, so those of many sentences come at once."""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, uint64 to uint64 of any shape: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # arrays wrap around without a warning
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class CounterRng:
    """A stream of random numbers for each of n places, a pure function of (seed, place).

    Args:
      seed: any number.
      places: int [n], not negative; equal places draw equal numbers.
    """

    def __init__(self, seed: int, places: np.ndarray):
        start = splitmix64(np.array([seed % 2**64], np.uint64))
        self._keys = splitmix64(start + np.asarray(places, np.uint64) * _STEP)  # [n]
        self._drawn = 0

    def bits(self, count: int) -> np.ndarray:
        """The next `count` numbers of every stream: uint64 [n, count]."""
        steps = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64) * _STEP
        self._drawn += count
        return splitmix64(self._keys[:, None] + steps)

    def integers(self, highs: np.ndarray) -> np.ndarray:
        """Uniform numbers in [0, high): int64, shaped as `highs`, int [n] or [n, m] in [1, 2^31)."""
        wanted = np.asarray(highs, np.uint64).reshape(len(self._keys), -1)
        drawn = ((self.bits(wanted.shape[1]) >> np.uint64(32)) * wanted) >> np.uint64(32)
        return drawn.astype(np.int64).reshape(np.shape(highs))

    def permutations(self, count: int) -> np.ndarray:
        """A random order of [0, count) for every stream: int64 [n, count]."""
        return np.argsort(self.bits(count), axis=1, kind="stable")
