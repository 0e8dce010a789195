"""Counts of sentences by component, in proportion to weights, monotone and in closed form.

A Huffman tree over the components splits n sentences: each node passes the rounded share of its lighter child to that
child and the rest to the other. Both grow with n by 0 or 1 at a time, so the counts of any prefix are non-negative and
monotone, their sum is exact, and each stays within two sentences of its exact share, for any weights. Differences
of rounded cumulative shares would not be monotone for weights below one sentence a block.
"""

import heapq
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt64

SCALE = 2**32  # integer weights sum to it, so that counts repeat exactly after as many sentences


class Shares:
    """Integer weights of components, and the counts that follow from them.

    Args:
      weights: positive, of any scale.

    Attributes:
      weights: integers that sum to `SCALE`; 0 where a weight is below 1 / `SCALE` of all.
    """

    def __init__(self, weights: Sequence[Fraction]):
        totals = list(itertools.accumulate(weights))
        bounds = [0] + [int(total / totals[-1] * SCALE) for total in totals]
        self.weights = [high - low for low, high in itertools.pairwise(bounds)]
        heap = [(weight, i) for i, weight in enumerate(self.weights)]
        heapq.heapify(heap)
        self._totals = list(self.weights)  # by node: leaves first
        self._splits: list[tuple[int, int, int]] = []  # node, lighter child, other child; children before parents
        while len(heap) > 1:
            (light, i), (heavy, j) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((len(self._totals), i, j))
            heapq.heappush(heap, (light + heavy, len(self._totals)))
            self._totals.append(light + heavy)

    def counts(self, sentences: int | UInt64[np.ndarray, " n"]) -> list[Any]:
        """By component, its share of the first `sentences` of the mixture: ints, or uint64 [n] as given."""
        cycles, rest = sentences // SCALE, sentences % SCALE
        counts: dict[int, Any] = {len(self._totals) - 1: rest}
        for node, light, heavy in reversed(self._splits):
            count, total = counts.pop(node), self._totals[node]
            # At most 2³² · 2³¹ + 2³¹, below 2⁶⁴: the lighter child has no more than half of the weight.
            counts[light] = (count * self._totals[light] + total // 2) // max(total, 1)
            counts[heavy] = count - counts[light]
        return [cycles * weight + counts[i] for i, weight in enumerate(self.weights)]
