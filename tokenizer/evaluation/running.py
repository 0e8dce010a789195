"""Statistics of a stream of images in memory that doesn't grow with it: means with intervals, extremes, a sample."""

import dataclasses
import heapq
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from lvm.evaluation.figures import RESAMPLES, Estimate

Pixels = UInt8[np.ndarray, "R R 3"]


class BootstrapWeights:
    """How often each image occurs in each bootstrap resample: Poisson of mean 1, independent (Poisson bootstrap).

    Equal images in equal order get equal weights, so that the difference of two tokenizers' resamples is that of a
    paired bootstrap.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def sample(self, count: int) -> Float[np.ndarray, "n resamples"]:
        """Weights of the next images."""
        return self._rng.poisson(1.0, (count, RESAMPLES)).astype(np.float64)


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
        """The mean; NaN without any image."""
        if not self._count:
            return Estimate(float("nan"))
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


class Examples:
    """The examples of highest and lowest PSNR, and a uniform sample (reservoir sampling with a fixed seed)."""

    def __init__(self, size: int):
        self._size, self._count, self._rng = size, 0, np.random.default_rng(0)
        self._heaps: dict[int, list[tuple[float, int, Example]]] = {1: [], -1: []}  # of highest and lowest PSNR
        self.sample: list[Example] = []

    def add(
        self, stream: str, keys: Sequence[str], psnr: Float[np.ndarray, " n"], images: UInt8[np.ndarray, "_ R R 3"],
        fetch: Callable[[], UInt8[np.ndarray, "_ R R 3"]],
    ) -> None:  # fmt: skip
        """Adds images; `fetch` returns their reconstructions and is called if any of them is kept."""
        decoded: np.ndarray | None = None
        for i, (key, value) in enumerate(zip(keys, psnr.tolist(), strict=True)):
            is_extreme = any(len(heap) < self._size or sign * value > heap[0][0] for sign, heap in self._heaps.items())
            slot = self._count if self._count < self._size else int(self._rng.integers(self._count + 1))
            self._count += 1
            if not is_extreme and slot >= self._size:
                continue
            decoded = fetch() if decoded is None else decoded
            example = Example(key, stream, value, images[i].copy(), decoded[i].copy())
            if slot < self._size:
                self.sample[slot : slot + 1] = [example]
            for sign, heap in self._heaps.items():
                entry = (sign * value, -self._count, example)  # of equal ones, the first is kept
                (heapq.heappush if len(heap) < self._size else heapq.heappushpop)(heap, entry)

    @property
    def best(self) -> list[Example]:
        """Highest PSNR first."""
        return [example for *_, example in sorted(self._heaps[1], reverse=True)]

    @property
    def worst(self) -> list[Example]:
        """Lowest PSNR first."""
        return [example for *_, example in sorted(self._heaps[-1], reverse=True)]
