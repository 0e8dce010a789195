"""A random permutation of [0, n) by random access, in no memory."""

from __future__ import annotations

import numpy as np

_ROUNDS = 4


def permute(indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a seeded permutation of [0, n) sends `indices`.

    A balanced Feistel network over the smallest even number of bits that holds n, walked along its cycles
    until the result is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
      indices: int64 [k], each in [0, n).
      n: size of the domain, up to 2^62.
      seed: any number; another seed is another permutation.

    Returns:
      int64 [k].
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng([seed % 2**64, n]).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
    result = _feistel(np.asarray(indices, np.uint64), keys, half)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], keys, half)
    return result.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    mask = np.uint64(2**half - 1)
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    # The finalizer of splitmix64: every input bit reaches every output bit.
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
