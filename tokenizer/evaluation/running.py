"""Statistics of a stream of images in memory that doesn't grow with it: means with intervals, extremes, a sample."""

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.split import content_hash
from lvm.evaluation.figures import MIN_GROUPS, RESAMPLES, Estimate

Pixels = UInt8[np.ndarray, "R R 3"]
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])  # distribution function of mean 1


def bootstrap_weights(groups: Sequence[str]) -> Float[np.ndarray, "n resamples"]:
    """Times that each image occurs in each bootstrap resample: Poisson of mean 1 (Poisson bootstrap).

    A function of the image's group alone: frames of a video, which aren't independent, occur together, any order of the
    images has the same resamples, and the difference of two tokenizers' resamples is that of a paired bootstrap.
    """
    unique, indices = np.unique(np.array(groups, object), return_inverse=True)
    hashes = np.array([content_hash(group.encode()) >> 1 for group in unique])  # int64
    uniform = CounterRng(0, hashes).bits(RESAMPLES) / 2.0**64
    return np.searchsorted(_POISSON, uniform, "right")[indices].astype(np.float64)


def image_hash(stream: str, key: str) -> int:
    """A stable 64-bit hash of an image's name."""
    return content_hash(f"{stream}/{key}".encode())


class RunningMean:
    """The mean of a statistic over images, with resamples. Images without a value (NaN) are left out."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0
        self._sums, self._counts = np.zeros(RESAMPLES), np.zeros(RESAMPLES)

    def add(self, values: Shaped[np.ndarray, " n"], weights: Float[np.ndarray, "n resamples"]) -> None:
        """Adds images."""
        is_valid = ~np.isnan(values)
        values, weights = values[is_valid].astype(np.float64), weights[is_valid]
        self._sum, self._count = self._sum + float(values.sum()), self._count + len(values)
        self._sums += values @ weights
        self._counts += weights.sum(0)

    def estimate(self) -> Estimate:
        """The mean, NaN without any image; images of fewer than about `MIN_GROUPS` groups have no interval."""
        if not self._count:
            return Estimate(float("nan"))
        # Of groups of n images, the resampled count has the variance Σ n². (Σ n)² / Σ n² is the number of groups
        # if they are equally large, and of others that of as many equal ones.
        if self._count**2 < (MIN_GROUPS - 0.5) * np.var(self._counts):
            return Estimate(self._sum / self._count)
        resamples = np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), np.nan)
        return Estimate(self._sum / self._count, resamples)


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and its reconstruction."""

    key: str
    stream: str
    psnr: float
    image: Pixels
    decoded: Pixels


_Entry = tuple[tuple[float, float], int, Example]  # rank, which is highest in those kept; distinct number


class Examples:
    """The examples of highest and lowest PSNR, and a uniform sample: those whose names have the lowest hashes.

    They depend on the images alone, not on their order; the sample doesn't on the tokenizer.
    """

    def __init__(self, size: int):
        self._size, self._count = size, 0
        self._heaps: dict[str, list[_Entry]] = {"best": [], "worst": [], "sample": []}

    def add(
        self, stream: str, keys: Sequence[str], psnr: Float[np.ndarray, " n"], images: UInt8[np.ndarray, "_ R R 3"],
        fetch: Callable[[], UInt8[np.ndarray, "_ R R 3"]],
    ) -> None:  # fmt: skip
        """Adds images; `fetch` returns their reconstructions and is called if any of them is kept."""
        decoded: np.ndarray | None = None
        for i, (key, value) in enumerate(zip(keys, psnr.tolist(), strict=True)):
            order, self._count = image_hash(stream, key), self._count + 1
            ranks = {"best": (value, -order), "worst": (-value, -order), "sample": (-order, 0)}
            kept = [n for n, heap in self._heaps.items() if len(heap) < self._size or ranks[n] > heap[0][0]]
            if not kept:
                continue
            decoded = fetch() if decoded is None else decoded
            example = Example(key, stream, value, images[i].copy(), decoded[i].copy())
            for name in kept:
                heap, entry = self._heaps[name], (ranks[name], -self._count, example)
                (heapq.heappush if len(heap) < self._size else heapq.heappushpop)(heap, entry)

    @property
    def best(self) -> list[Example]:
        """Highest PSNR first."""
        return self._sorted("best")

    @property
    def worst(self) -> list[Example]:
        """Lowest PSNR first."""
        return self._sorted("worst")

    @property
    def sample(self) -> list[Example]:
        """Lowest hash first."""
        return self._sorted("sample")

    def _sorted(self, name: str) -> list[Example]:
        return [example for *_, example in sorted(self._heaps[name], reverse=True)]
