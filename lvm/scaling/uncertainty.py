"""Trust in a fit: bootstrap intervals, predictions of budgets that were left out, and speedups with intervals."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int
from threadpoolctl import threadpool_limits

from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info
from lvm.scaling.laws import Law
from lvm.scaling.observations import Observations
from lvm.scaling.parametric import Fit, check_observations, fit_law, log_residuals, objective, refit

CONFIDENCE = 0.95
_HELD_OUT_INITS = 20  # a part of the grid: those fits begin near the optimum of all rows besides
_MAX_FOLDS = 8
_LOG_EVERY_S = 10.0
Interval = tuple[float, float]
Statistic = Callable[[Observations], Mapping[str, float]]


def resample(observations: Observations, rng: np.random.Generator) -> Observations:
    """A bootstrap sample: runs with replacement, each with all of its rows."""
    runs, first = np.unique(observations.run, return_index=True)
    if len(runs) == len(observations):
        return observations.take(rng.integers(0, len(observations), len(observations)))
    rows = {run: np.flatnonzero(observations.run == run) for run in runs[np.argsort(first)]}
    chosen = rng.choice(list(rows), len(rows))
    return observations.take(np.concatenate([rows[run] for run in chosen]))


@threadpool_limits.wrap(limits=1)
def bootstrap(observations: Observations, statistic: Statistic, draws: int, seed: int) -> dict[str, Interval]:
    """Percentile intervals of 95 % of each value of a statistic, over resampled runs.

    A value that is missing or not finite in more than half of the draws has no interval.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    progress, logged_at = Progress(draws, unit="resamples"), time.monotonic()
    for draw in range(draws):
        for name, value in statistic(resample(observations, rng)).items():
            values.setdefault(name, []).append(value)
        if time.monotonic() - logged_at > _LOG_EVERY_S:
            logged_at = time.monotonic()
            log_info(progress.line(draw + 1))
    return intervals(values, draws)


def intervals(values: Mapping[str, list[float]], draws: int) -> dict[str, Interval]:
    """Central intervals of 95 % of the finite values of each name, if they are at least half of `draws`."""
    tail = (1 - CONFIDENCE) / 2
    finite = {name: [value for value in x if np.isfinite(value)] for name, x in values.items()}
    return {
        name: (float(np.quantile(x, tail)), float(np.quantile(x, 1 - tail)))
        for name, x in finite.items()
        if 2 * len(x) >= draws and x
    }


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Prediction of a budget by a fit to all smaller ones.

    Attributes:
      fitted_flops: largest that were fitted.
      flops: geometric mean of those predicted.
      fitted_rows, rows: of both.
      mean_error: of the predicted losses, relative, signed: positive where they are too high.
      max_error: largest of their absolute values.
      best_error: relative error of the lowest loss of the budget.
      problem: why there is no prediction; "" if there is.
    """

    fitted_flops: float
    flops: float
    fitted_rows: int
    rows: int
    mean_error: float = float("nan")
    max_error: float = float("nan")
    best_error: float = float("nan")
    problem: str = ""


@threadpool_limits.wrap(limits=1)
def roll_out(observations: Observations, fit: Fit) -> list[HeldOut]:
    """Fits to the smallest budgets, each with a prediction of the next one; the last leaves the largest budget out.

    Where budgets are many, neighbors count as one: a prediction has an eighth of the rows.
    """
    numbers = _folds(observations)
    results = []
    for number in range(2, int(numbers.max()) + 1):
        fitted, held_out = observations.take(numbers < number), observations.take(numbers == number)
        flops = float(np.exp(np.log(held_out.flops).mean()))
        summary = HeldOut(float(fitted.flops.max()), flops, len(fitted), len(held_out))
        try:
            law = _fit_near(fitted, fit)
        except UserError as error:
            results.append(dataclasses.replace(summary, problem=str(error)))
            continue
        errors = np.expm1(log_residuals(law, held_out))
        results.append(
            dataclasses.replace(
                summary,
                mean_error=float(errors.mean()),
                max_error=float(np.abs(errors).max()),
                best_error=float(errors[held_out.loss.argmin()]),
            )
        )
    return results


def _folds(observations: Observations) -> Int[np.ndarray, " n"]:
    """Number of each row's fold, from the smallest budgets: one budget, or several with an eighth of the rows."""
    budgets = observations.budgets()
    counts = np.bincount(budgets)
    if len(counts) <= _MAX_FOLDS:
        return budgets
    folds = (np.cumsum(counts) - 1) * _MAX_FOLDS // len(observations)
    return np.unique(folds, return_inverse=True)[1].reshape(-1)[budgets]


def _fit_near(observations: Observations, fit: Fit) -> Law:
    """The better one of a fit from the optimum of more rows and one from a few starts."""
    check_observations(observations, fit.settings)
    near = refit(observations, fit)
    far = fit_law(observations, dataclasses.replace(fit.settings, inits=_HELD_OUT_INITS), processes=1).law
    return min((near, far), key=lambda law: objective(law, observations, fit.settings))


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Effective speedup over a baseline at a budget: how many times its FLOPs the baseline needs for the same loss.

    With L∞ and a of the baseline's compute-optimal L − L∞ ∝ C^−a, it is ((L_baseline − L∞) / (L − L∞))^(1/a). Infinite
    where the baseline never reaches the loss.
    """

    flops: float
    loss: float
    baseline_loss: float
    speedup: float
    interval: Interval | None


@threadpool_limits.wrap(limits=1)
def speedups(
    observations: Observations, fit: Fit, baseline: Observations, baseline_fit: Fit, budgets: list[float], draws: int,
    seed: int,
) -> list[Speedup]:  # fmt: skip
    """Effective speedups of a recipe over a baseline at some budgets, both at their optimal N and D.

    Intervals resample the runs of both.
    """
    ratios = observations.flops_ratio, baseline.flops_ratio

    def speedup(law: Law, baseline_law: Law, flops: float) -> float:
        return baseline_law.flops_to_reach(law.optimum(flops, ratios[0]).loss, ratios[1]) / flops

    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {str(flops): [] for flops in budgets}
    for _ in range(draws):
        laws = refit(resample(observations, rng), fit), refit(resample(baseline, rng), baseline_fit)
        for flops in budgets:
            values[str(flops)].append(speedup(*laws, flops))
    ranges = intervals(values, draws)
    return [
        Speedup(
            flops,
            fit.law.optimum(flops, ratios[0]).loss,
            baseline_fit.law.optimum(flops, ratios[1]).loss,
            speedup(fit.law, baseline_fit.law, flops),
            ranges.get(str(flops)),
        )
        for flops in budgets
    ]
