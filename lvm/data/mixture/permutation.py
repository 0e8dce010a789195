"""Random permutations of [0, n) by random access, in no memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from lvm.data.mixture.counter_rng import CounterRng, splitmix64

SHUFFLES = ("all", "blocks")
PAGE = 64  # neighbours that stay together in the first step of "blocks": a record holds as many single images
WINDOW = 64 * PAGE  # places that the second step mixes

_ROUNDS = 6
_ONE = np.uint64(1)


def shuffle_indices(places: np.ndarray, n: int, seed: int, shuffle: str, scenes: int = 1) -> np.ndarray:
    """What stands at `places` of a seeded order of [0, n): int64, shaped as `places`.

    `shuffle` is "all" (every order alike) or "blocks" (`permute_pages`, of things of so many `scenes` each).
    """
    flat = np.asarray(places, np.int64).ravel()
    page, window = max(1, PAGE // scenes), max(1, WINDOW // scenes)
    permuted = permute(flat, n, seed) if shuffle == "all" else permute_pages(flat, n, seed, page, window)
    return permuted.reshape(np.shape(places))


def permute(indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a seeded permutation of [0, n) sends `indices`.

    An unbalanced Feistel network over the pairs of Z_a × Z_b, a near the root of n and a·b hardly more, walked along
    its cycles until the result is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
      indices: int64 [k], each in [0, n).
      n: size of the domain, up to 2^62.
      seed: any number; another seed is another permutation.

    Returns:
      int64 [k].
    """
    high = math.isqrt(max(0, n - 1)) + 1
    low = -(-n // high)
    sides = np.uint64(high), np.uint64(low)
    keys = _keys(seed % 2**64, n)
    result = _feistel(np.asarray(indices, np.uint64), keys, *sides)
    while (outside := result >= np.uint64(n)).any():
        result[outside] = _feistel(result[outside], keys, *sides)
    return result.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _keys(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, n]).integers(0, 2**64, _ROUNDS, dtype=np.uint64)


def permute_each(indices: np.ndarray, sizes: np.ndarray, seed: int, places: np.ndarray) -> np.ndarray:
    """Where many permutations, one for each of `places`, send one index each.

    Args:
      indices: int64 [k], each in [0, its size).
      sizes: int64 [k], of the domains, below 2^53; equal places have equal sizes.
      seed: any number.
      places: int64 [k], which permutation.

    Returns:
      int64 [k].
    """
    sizes = np.asarray(sizes, np.uint64)
    high = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    low = (sizes + high - np.uint64(1)) // high
    keys = CounterRng(seed, places).bits(_ROUNDS).T  # [rounds, k]
    result = _feistel(np.asarray(indices, np.uint64), keys, high, low)
    while (outside := np.flatnonzero(result >= sizes)).size:
        result[outside] = _feistel(result[outside], keys[:, outside], high[outside], low[outside])
    return result.astype(np.int64)


def permute_pages(
    indices: np.ndarray, n: int, seed: int, page: int = PAGE, window: int = WINDOW
) -> np.ndarray:
    """A permutation of [0, n) whose neighbours come from few places, for storage where random reads are slow.

    Pages of `page` neighbours are permuted, then places within windows of `window`: a window is filled from
    as many pages as it holds. What doesn't fill a page comes last before the windows are mixed; a seeded
    turn of the circle makes that something else under every seed.

    Args, returns: as `permute`.
    """
    indices = np.asarray(indices, np.int64)
    mixed = np.empty_like(indices)
    windows = indices // window
    for number in np.unique(windows).tolist():
        mine, start = windows == number, number * window
        size = min(window, n - start)
        mixed[mine] = start + permute(indices[mine] - start, size, _combined(seed, number))
    pages, turn = n // page, _combined(seed, -1) % n
    whole = mixed < pages * page
    mixed[whole] = permute(mixed[whole] // page, pages, seed) * page + mixed[whole] % page
    return (mixed + turn) % n


def _combined(seed: int, part: int) -> int:
    return int(splitmix64(splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(part % 2**64))[0])


def _feistel(x: np.ndarray, keys: np.ndarray, high: Any, low: Any) -> np.ndarray:
    """Pairs (x // low, x % low) of Z_high × Z_low: each round turns one side by a hash of the other.

    Keys are uint64 [rounds] or [rounds, k], `high` and `low` uint64 [] or [k].
    """
    left, right = np.divmod(x, low)
    for number, key in enumerate(keys):
        if number % 2:
            right = (
                right + (splitmix64(left + key) >> _ONE)
            ) % low  # a bit less, so that the sum doesn't wrap
        else:
            left = (left + (splitmix64(right + key) >> _ONE)) % high
    return left * low + right
