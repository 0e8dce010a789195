"""Pseudo-random permutations of [0, n) with random access and no memory."""

import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from lvm.data.mixture.counter_rng import CounterRng, splitmix64

SHUFFLES = ("all", "blocks")
PAGE = 64  # neighbors that "blocks" keeps together in its first step: as many single images as a record holds
WINDOW = 64 * PAGE  # indices that its second step mixes

_ROUNDS = 6
_ONE = np.uint64(1)


def shuffle_indices(
    indices: Int[np.ndarray, "*shape"], n: int, seed: int, shuffle: str, scenes: int = 1
) -> Int64[np.ndarray, "*shape"]:
    """The elements at `indices` of a seeded order of [0, n).

    `shuffle` is "all" (a uniform permutation) or "blocks" (`permute_pages`; an element stands for `scenes` scenes).
    """
    flat = np.asarray(indices, np.int64).ravel()
    page, window = max(1, PAGE // scenes), max(1, WINDOW // scenes)
    permuted = permute(flat, n, seed) if shuffle == "all" else permute_pages(flat, n, seed, page, window)
    return permuted.reshape(np.shape(indices))


def permute(indices: Int[np.ndarray, " k"], n: int, seed: int) -> Int64[np.ndarray, " k"]:
    """Applies a seeded permutation of [0, n) to `indices`.

    An unbalanced Feistel network over Z_a × Z_b, a near √n and a·b barely above n, with cycle walking until the
    result is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
      indices: each in [0, n).
      n: size of the domain, up to 2^62.
      seed: any integer; it selects the permutation.
    """
    high = math.isqrt(max(0, n - 1)) + 1
    low = -(-n // high)
    radices = np.uint64(high), np.uint64(low)
    keys = _keys(seed % 2**64, n)
    result = _feistel(np.asarray(indices, np.uint64), keys, *radices)
    while (outside := result >= np.uint64(n)).any():
        result[outside] = _feistel(result[outside], keys, *radices)
    return result.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _keys(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, n]).integers(0, 2**64, _ROUNDS, dtype=np.uint64)


def permute_each(
    indices: Int[np.ndarray, " k"], sizes: Int[np.ndarray, " k"], seed: int, ids: Int[np.ndarray, " k"]
) -> Int64[np.ndarray, " k"]:
    """Applies many permutations, selected by `ids`, to one index each.

    Args:
      indices: each in [0, its size).
      sizes: of the domains, below 2^53; equal ids have equal sizes.
      seed: any integer.
      ids: the permutation of each index.
    """
    bounds = np.asarray(sizes, np.uint64)
    high = np.ceil(np.sqrt(bounds)).astype(np.uint64)
    low = (bounds + high - np.uint64(1)) // high
    keys = CounterRng(seed, ids).bits(_ROUNDS).T  # [rounds, k]
    result = _feistel(np.asarray(indices, np.uint64), keys, high, low)
    while (outside := np.flatnonzero(result >= bounds)).size:
        result[outside] = _feistel(result[outside], keys[:, outside], high[outside], low[outside])
    return result.astype(np.int64)


def permute_pages(
    indices: Int[np.ndarray, " k"], n: int, seed: int, page: int = PAGE, window: int = WINDOW
) -> Int64[np.ndarray, " k"]:
    """Like `permute`, but neighbors of the result come from few pages, for storage with slow random reads.

    Pages of `page` neighbors are permuted, then elements within windows of `window`, so that a window reads only as
    many pages as it holds. A remainder smaller than a page stays last until windows are mixed; the result is rotated
    by a seeded offset, so that every seed has another remainder.
    """
    indices = np.asarray(indices, np.int64)
    mixed = np.empty_like(indices)
    windows = indices // window
    for index in np.unique(windows).tolist():
        mask, start = windows == index, index * window
        size = min(window, n - start)
        mixed[mask] = start + permute(indices[mask] - start, size, _combine(seed, index))
    num_pages, offset = n // page, _combine(seed, -1) % n
    paged = mixed < num_pages * page
    mixed[paged] = permute(mixed[paged] // page, num_pages, seed) * page + mixed[paged] % page
    return (mixed + offset) % n


def _combine(seed: int, index: int) -> int:
    return int(splitmix64(splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(index % 2**64))[0])


def _feistel(x: np.ndarray, keys: np.ndarray, high: Any, low: Any) -> np.ndarray:
    """Feistel rounds over the pairs (x // low, x % low); keys [rounds] or [rounds, k], `high` and `low` [] or [k]."""
    left, right = np.divmod(x, low)
    for i, key in enumerate(keys):  # the hash drops a bit, so that the sum doesn't wrap
        if i % 2:
            right = (right + (splitmix64(left + key) >> _ONE)) % low
        else:
            left = (left + (splitmix64(right + key) >> _ONE)) % high
    return left * low + right
