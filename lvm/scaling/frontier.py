"""Compute-optimal N and D without a law of the loss: Chinchilla's first two approaches (arXiv 2203.15556).

- Envelope: the runs that no cheaper run beats.
- IsoFLOP: for each compute budget, the minimum of a parabola of the loss over log N.

Each gives one (C, N*, D*) a point, and power laws N* ∝ C^a and D* ∝ C^b through them. IsoFLOP minima are biased without
any noise where sizes are not centered on N* or reach far: the loss of a budget is no parabola.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lvm.scaling.laws import Law
from lvm.scaling.observations import Observations

_MIN_SIZES = 4  # of a parabola: three fit any points
_MIN_POINTS = 3  # of a power law's check


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = coefficient · C^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, flops: float) -> float:
        return self.coefficient * flops**self.exponent


@dataclasses.dataclass(frozen=True)
class Frontier:
    """N*(C) and D*(C)."""

    params: PowerLaw
    tokens: PowerLaw


@dataclasses.dataclass(frozen=True)
class Parabola:
    """The parabola of a compute budget, L = polynomial(log N).

    Attributes:
      flops: geometric mean of the budget's rows.
      polynomial: coefficients, highest power first; () where there is no parabola.
      lowest, highest: sizes sampled.
      num_rows: of the budget.
      params, tokens, loss: at the minimum; NaN where there is none.
      problem: why its minimum isn't used; "" where it is.
    """

    flops: float
    polynomial: tuple[float, ...]
    lowest: float
    highest: float
    num_rows: int
    params: float
    tokens: float
    loss: float
    problem: str

    @property
    def center_offset(self) -> float:
        """The center of the sizes sampled over N*, both as logarithms: a factor, 1 if centered."""
        return float(np.sqrt(self.lowest * self.highest) / self.params)


def fit_parabolas(observations: Observations) -> list[Parabola]:
    """A parabola for each compute budget, by increasing FLOPs."""
    numbers = observations.budgets()
    ratio = observations.flops_ratio
    return [_fit_parabola(observations.take(numbers == number), ratio) for number in np.unique(numbers)]


def _fit_parabola(rows: Observations, flops_ratio: float) -> Parabola:
    flops = float(np.exp(np.log(rows.flops).mean()))
    lowest, highest = float(rows.params.min()), float(rows.params.max())
    sizes = len(np.unique(rows.params))
    if sizes < _MIN_SIZES:
        problem = f"{sizes} sizes; a parabola needs at least {_MIN_SIZES}"
        return Parabola(flops, (), lowest, highest, len(rows), np.nan, np.nan, np.nan, problem)
    x = np.log(rows.params)
    polynomial = np.polyfit(x - x.mean(), rows.loss, 2)
    a, b, c = polynomial
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        params = float(np.exp(x.mean() - b / (2 * a)))
    shifted = (float(a), float(b - 2 * a * x.mean()), float(c - b * x.mean() + a * x.mean() ** 2))
    problem = ""
    if not a > 0:
        problem = "the loss has no minimum over sizes"
    elif not lowest < params < highest:
        problem = f"the minimum, at {params:.3g} parameters, is outside of the sizes {lowest:.3g} to {highest:.3g}"
    if not a > 0:
        return Parabola(flops, shifted, lowest, highest, len(rows), np.nan, np.nan, np.nan, problem)
    loss = float(c - b**2 / (4 * a))
    return Parabola(flops, shifted, lowest, highest, len(rows), params, flops / flops_ratio / params, loss, problem)


def isoflop_frontier(parabolas: Sequence[Parabola]) -> Frontier | None:
    """Power laws through the minima that are used; None if there are fewer than two."""
    used = [parabola for parabola in parabolas if not parabola.problem]
    flops, params, tokens = (np.array([getattr(p, name) for p in used]) for name in ("flops", "params", "tokens"))
    return _fit_frontier(flops, params, tokens) if len(used) > 1 else None


def envelope(observations: Observations) -> Observations:
    """The rows with a lower loss than every row of as many or fewer FLOPs."""
    order = np.lexsort((observations.loss, observations.flops))
    sorted_rows = observations.take(order)
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_rows.loss[:-1]]))
    return sorted_rows.take(sorted_rows.loss < lowest_before)


def envelope_frontier(observations: Observations) -> Frontier | None:
    """Power laws through the rows of the envelope; None if there are too few, or all of one budget."""
    rows = envelope(observations)
    if len(rows) < _MIN_POINTS or len(np.unique(rows.budgets())) < 2:
        return None
    return _fit_frontier(rows.flops, rows.params, rows.tokens)


def _fit_frontier(
    flops: Float[np.ndarray, " n"], params: Float[np.ndarray, " n"], tokens: Float[np.ndarray, " n"]
) -> Frontier:
    laws = []
    for values in (params, tokens):
        slope, intercept = np.polyfit(np.log(flops), np.log(values), 1)
        laws.append(PowerLaw(float(np.exp(intercept)), float(slope)))
    return Frontier(*laws)


def isoflop_bias(observations: Observations, law: Law, budgets: Sequence[float]) -> list[float]:
    """Relative error of the IsoFLOP approach's N* at some budgets, if `law` were exactly true on this grid.

    Parabolas are fitted to the law's own losses at the rows' sizes and tokens; what their minima miss is bias of the
    approach and not noise. Empty if the grid has fewer than two usable parabolas.
    """
    exact = dataclasses.replace(observations, loss=law.loss(observations.params, observations.tokens))
    frontier = isoflop_frontier(fit_parabolas(exact))
    if frontier is None:
        return []
    return [frontier.params(C) / law.optimum(C, observations.flops_ratio).params - 1 for C in budgets]
