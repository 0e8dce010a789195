"""Results of an evaluation: figures with bootstrap intervals and baselines, pictures and plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

RESAMPLES = 2000
MIN_GROUPS = 10  # of fewer, an interval covers far less than 95 %: resamples of 3 cover 75 %, of 10 about 90 %
_CHUNK = 2**24  # numbers of resampled statistics in memory at once
Aggregate = Callable[[np.ndarray], np.ndarray]  # mean statistics [R, *shape] of R resamples → figures [R]
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, with its bootstrap resamples if it is one of a sample of originals.

    Equal groups of episodes are resampled alike, so that the difference of two models' `resamples` is that of a paired
    bootstrap.
    """

    value: float
    resamples: Float[np.ndarray, " R"] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def interval(self) -> Interval | None:
        """95 % percentile-bootstrap interval."""
        if self.resamples is None:
            return None
        low, high = np.nanpercentile(self.resamples, [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        interval = self.interval
        return {"value": self.value} | ({} if interval is None else {"interval": list(interval)})


def mean_of(means: np.ndarray) -> np.ndarray:
    """The aggregate of a statistic that is the figure itself."""
    return means


def estimate(
    statistics: Shaped[np.ndarray, "n ..."],
    aggregate: Aggregate = mean_of,
    groups: Sequence[str] | Shaped[np.ndarray, " n"] | None = None,
) -> Estimate:
    """Estimates `aggregate` of the mean of per-episode statistics, resampling groups of episodes with a fixed seed.

    Episodes without a value (NaN) are left out; with none left the value is NaN. Sums over episodes, such as counts of
    pixels, are means to every aggregate that doesn't depend on their scale.

    Args:
      statistics: of each episode.
      aggregate: mean statistic → figure.
      groups: of episodes that aren't independent, as those of one original, which are resampled together (the cluster
        bootstrap: Field and Welsh, 2007, "Bootstrapping clustered data"); by default each episode is one. There is no
        interval if fewer than `MIN_GROUPS` have a value.
    """
    statistics = np.asarray(statistics, np.float64)
    shape = statistics.shape[1:]
    flat = statistics.reshape(len(statistics), math.prod(shape))
    is_valid = ~np.isnan(flat).any(1)
    if not is_valid.any():
        return Estimate(float("nan"))
    value = float(aggregate(flat[is_valid].mean(0).reshape(1, *shape))[0])
    # Groups are sampled with those without a value: all figures are resampled alike.
    indices = np.arange(len(flat)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(indices.max()) + 1
    sums, sizes = np.zeros((count, flat.shape[1])), np.bincount(indices[is_valid], minlength=count)
    if np.count_nonzero(sizes) < MIN_GROUPS:
        return Estimate(value)
    np.add.at(sums, indices[is_valid], flat[is_valid])
    return Estimate(value, _resample(sums, sizes, lambda means: aggregate(means.reshape(-1, *shape))))


def format_count(noun: str, groups: Sequence[str] | Shaped[np.ndarray, " n"]) -> str:
    """Text such as "600 queries of 283 originals", by the group of each."""
    distinct, text = len(np.unique(np.asarray(groups))), f"{len(groups)} {noun}"
    if distinct == len(groups):
        return text
    return f"{text} of {distinct} originals" if distinct > 1 else f"{text} of one original"


def _resample(sums: Float[np.ndarray, "G d"], sizes: Int[np.ndarray, " G"], aggregate: Aggregate) -> np.ndarray:
    """Figures [R] of resamples of groups, by the sums and the numbers of their episodes."""
    rng, count = np.random.default_rng(0), len(sizes)
    resamples = np.empty(RESAMPLES)
    rows = max(1, _CHUNK // max(count, sums.shape[1]))
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        indices = rng.integers(count, size=(stop - start, count))
        offsets = count * np.arange(stop - start)[:, None]
        times = np.bincount((indices + offsets).ravel(), minlength=indices.size).reshape(indices.shape)
        totals = (times @ sizes)[:, None]
        resamples[start:stop] = aggregate(np.where(totals > 0, times @ sums / np.maximum(totals, 1), np.nan))
    return resamples


@dataclasses.dataclass(frozen=True)
class Published:
    """A published figure, and whose on what data it is: mostly others than those of the figure beside it."""

    value: float
    text: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of answers, which a `Figure` gives the value of.

    Attributes:
      name: the figure's.
      text, unit, higher_is_better, published: as of `Figure`.
      aggregate: mean statistic over queries → the figure.
    """

    name: str
    text: str
    unit: str = ""
    higher_is_better: bool = True
    aggregate: Aggregate = mean_of
    published: Published | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of an evaluation.

    Attributes:
      name: unique within its evaluator.
      estimate: the model's.
      text: its meaning, a noun phrase.
      unit: one of `format_value`'s.
      higher_is_better: None where neither is.
      baselines: trivial answers and chance levels by name, measured on the same episodes.
      ceiling: the true answer encoded and decoded by the tokenizer.
      published: the paper's figure.
    """

    name: str
    estimate: Estimate
    text: str
    unit: str = ""
    higher_is_better: bool | None = True
    baselines: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    ceiling: Estimate | None = None
    published: Published | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields without the resamples; those that are absent are left out."""
        content = {**self.estimate.to_json(), "text": self.text, "unit": self.unit}
        content["higher_is_better"] = self.higher_is_better
        content["baselines"] = {name: baseline.to_json() for name, baseline in self.baselines.items()}
        for name in ("ceiling", "published"):
            if (value := getattr(self, name)) is not None:
                content[name] = value.to_json()
        return content

    def resamples(self) -> dict[str, np.ndarray]:
        """float32 resamples of the figure, its baselines and its ceiling, by names that begin with the figure's."""
        estimates = {self.name: self.estimate, **{f"{self.name}|{k}": v for k, v in self.baselines.items()}}
        if self.ceiling is not None:
            estimates[f"{self.name}|ceiling"] = self.ceiling
        return {k: v.resamples.astype(np.float32) for k, v in estimates.items() if v.resamples is not None}


def format_value(value: float | None, unit: str) -> str:
    """A value as text: "%" of a share, "dB", "nats", "count", "deg", "x" (a ratio), or "" for three decimals."""
    if value is None or np.isnan(value):
        return "–"
    formats = {"%": "{:.1%}", "dB": "{:.1f} dB", "nats": "{:.3f} nats", "count": "{:,.0f}", "deg": "{:.1f}°"}
    formats |= {"x": "{:.2f}×", "": "{:.3f}"}
    return formats[unit].format(value)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves: name → points (x, y) or (x, y, low, high)."""

    series: Mapping[str, Sequence[tuple[float, ...]]]
    x_label: str
    y_label: str
    log_y: bool = False
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A titled picture: pixels or a plot, with one or two sentences."""

    title: str
    text: str
    content: UInt8[np.ndarray, "_ _ 3"] | Plot

    @property
    def name(self) -> str:
        """The title as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower().replace(",", "")).strip("-")
