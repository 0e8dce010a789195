"""Counter-based random numbers: each is a hash of (seed, counter), so many streams are evaluated at once."""

import numpy as np
from jaxtyping import Int, Int64, UInt64

_STEP = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


def splitmix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The splitmix64 finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # arrays wrap around without a warning
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class CounterRng:
    """One stream of random numbers for each of n counters, a pure function of (seed, counter).

    Args:
      seed: any integer.
      counters: non-negative; equal counters give equal streams.
    """

    def __init__(self, seed: int, counters: Int[np.ndarray, " n"]):
        start = splitmix64(np.array([seed % 2**64], np.uint64))
        self._keys = splitmix64(start + np.asarray(counters, np.uint64) * _STEP)  # [n]
        self._consumed = 0

    def bits(self, count: int) -> UInt64[np.ndarray, "n {count}"]:
        """The next `count` numbers of every stream."""
        steps = np.arange(self._consumed + 1, self._consumed + count + 1, dtype=np.uint64) * _STEP
        self._consumed += count
        return splitmix64(self._keys[:, None] + steps)

    def integers(self, highs: Int[np.ndarray, "n ..."]) -> Int64[np.ndarray, "n ..."]:
        """Uniform integers in [0, high); each high is in [1, 2^31)."""
        flat = np.asarray(highs, np.uint64).reshape(len(self._keys), -1)
        samples = ((self.bits(flat.shape[1]) >> np.uint64(32)) * flat) >> np.uint64(32)
        return samples.astype(np.int64).reshape(np.shape(highs))

    def permutations(self, count: int) -> Int64[np.ndarray, "n {count}"]:
        """A random permutation of [0, count) for every stream."""
        return np.argsort(self.bits(count), axis=1, kind="stable")
