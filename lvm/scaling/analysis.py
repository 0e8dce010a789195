"""Analysis of a sweep: the law with intervals, Chinchilla's other two approaches beside it, and what to doubt."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.scaling import frontier, observations, uncertainty
from lvm.scaling.frontier import Frontier, Parabola
from lvm.scaling.laws import Law
from lvm.scaling.observations import Observations
from lvm.scaling.parametric import Fit, FitSettings, fit_law, in_units, log_residuals, refit
from lvm.scaling.uncertainty import HeldOut, Interval, Speedup

APPROACHES = ("parametric", "isoflop", "envelope")
_OUTLIER_INITS = 300  # of the fit that residuals are taken from before outliers are dropped
_CURVE_POINTS = 33  # budgets of the curves of N* and D*
_MIN_FALL = 1e-9  # of a loss over the range of N or D, relative
_MIN_SHARE, _MAX_BIAS, _MAX_RATIO_SPREAD, _MAX_REACH = 0.05, 0.05, 1.2, 100.0  # beyond which the analysis warns


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an analysis.

    Attributes:
      fit: of the law.
      drop_highest, min_flops, max_flops: rows left out before the fit, see `observations.select`.
      max_residual: rows with a larger residual in robust deviations are left out; 0: none are.
      bootstrap: resamples of the runs; 0: no intervals.
      seed: of the resamples.
      budgets: FLOPs to predict N*, D* and the loss for; (): the largest budget, 10 and 100 times it.
    """

    fit: FitSettings = dataclasses.field(default_factory=FitSettings)
    drop_highest: int = 0
    min_flops: float = 0.0
    max_flops: float = math.inf
    max_residual: float = 0.0
    bootstrap: int = 200
    seed: int = 0
    budgets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if bad := [flops for flops in self.budgets if not 0 < flops < math.inf]:
            raise UserError(f"--budgets={bad[0]:g}: must be a positive number of FLOPs")
        if self.min_flops >= self.max_flops:
            raise UserError(f"--min_flops={self.min_flops:g} must be below --max_flops={self.max_flops:g}")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """N*, D* and, of the parametric approach, the loss of a budget, each with its interval of 95 % or None."""

    flops: float
    is_extrapolated: bool
    values: Mapping[str, float]
    intervals: Mapping[str, Interval | None]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Results of an analysis.

    Attributes:
      observations: the rows that were fitted, with the reasons of the others.
      intervals: of the law's coefficients in `fit.units`, and of `params_exponent`; empty without a bootstrap.
      exponents: approach → a of N* ∝ C^a with its interval; of `APPROACHES` those that the rows allow.
      parabolas: of each compute budget.
      envelope: rows of the envelope.
      predictions: approach → allocations for the budgets to predict.
      curves: approach → allocations for budgets over the whole range.
      bias: relative error of the IsoFLOP approach's N* for the budgets to predict if the law were true; [] if unknown.
      held_out: predictions of budgets from the smaller ones; the last leaves the largest budget out.
      warnings: what to doubt, a line each.
    """

    settings: Settings
    observations: Observations
    fit: Fit
    intervals: Mapping[str, Interval]
    exponents: Mapping[str, tuple[float, Interval | None]]
    parabolas: Sequence[Parabola]
    envelope: Observations
    predictions: Mapping[str, Sequence[Allocation]]
    curves: Mapping[str, Sequence[Allocation]]
    bias: Sequence[float]
    held_out: Sequence[HeldOut]
    speedups: Sequence[Speedup]
    warnings: Sequence[str]


def fit_rows(rows: Observations, settings: Settings) -> tuple[Observations, Fit]:
    """The rows that are fitted, outliers left out, and the fit.

    Raises:
      UserError: no rows are left, or they can't determine the law.
    """
    kept = observations.select(rows, settings.drop_highest, settings.min_flops, settings.max_flops)
    if settings.max_residual:
        first = fit_law(kept, dataclasses.replace(settings.fit, inits=settings.fit.inits or _OUTLIER_INITS))
        kept = observations.drop_outliers(kept, log_residuals(first.law, kept), settings.max_residual)
    return kept, fit_law(kept, settings.fit)


def analyze(
    rows: Observations, settings: Settings, baseline: Observations | None = None, warnings: Sequence[str] = ()
) -> Analysis:
    """Analyzes the rows of a sweep.

    Args:
      rows: of a table or a sweep.
      settings: of the selection, the fit and the bootstrap.
      baseline: rows of another recipe, for the effective speedup over it.
      warnings: of reading the rows, put before those of the analysis.

    Raises:
      UserError: no rows are left, or they can't determine the law.
    """
    kept, fit = fit_rows(rows, settings)
    log_info(f"{settings.fit.method}: {len(kept)} of {len(rows)} rows, objective {fit.objective:.6g}")
    top = float(kept.flops.max())
    budgets = settings.budgets or (top, *(float(f"{top * factor:.3g}") for factor in (10, 100)))
    ends = min(kept.flops.min(), *budgets), max(top, *budgets)
    curve = np.geomspace(*ends, _CURVE_POINTS).tolist()
    grid = [*budgets, *curve]
    point = _statistics(kept, fit, grid, is_point=True)
    optima = [point[f"parametric/{name}/{i}"] for name in ("params", "tokens") for i in range(len(grid))]
    if not (_falls(kept, fit.law) and all(1 <= value < math.inf for value in optima)):  # of parameters and tokens
        values = ", ".join(f"{name} {value:.3g}" for name, value in fit.coefficients.items())
        raise UserError(f"these {len(kept)} rows do not determine a law with compute-optimal N and D: {values}")
    ranges: Mapping[str, Interval] = {}
    if settings.bootstrap:
        log_info(f"bootstrap of {settings.bootstrap} resamples")
        ranges = uncertainty.bootstrap(kept, lambda o: _statistics(o, fit, grid), settings.bootstrap, settings.seed)
    approaches = [name for name in APPROACHES if f"{name}/exponent" in point]

    def allocations(approach: str, indices: range) -> list[Allocation]:
        names = [name for name in ("params", "tokens", "loss") if f"{approach}/{name}/{indices[0]}" in point]
        return [
            Allocation(
                grid[i],
                not kept.flops.min() * 0.99 <= grid[i] <= top * 1.01,
                {name: point[f"{approach}/{name}/{i}"] for name in names},
                {name: ranges.get(f"{approach}/{name}/{i}") for name in names},
            )
            for i in indices
        ]

    speedups = []
    if baseline is not None:
        baseline_rows, baseline_fit = fit_rows(baseline, settings)
        speedups = uncertainty.speedups(
            kept, fit, baseline_rows, baseline_fit, list(budgets), settings.bootstrap, settings.seed
        )
    parabolas = frontier.fit_parabolas(kept)
    bias = frontier.isoflop_bias(kept, fit.law, budgets) if "isoflop" in approaches else []
    names = [*fit.coefficients, "params_exponent"]
    return Analysis(
        settings=dataclasses.replace(settings, budgets=budgets),
        observations=kept,
        fit=fit,
        intervals={name: ranges[name] for name in names if name in ranges},
        exponents={name: (point[f"{name}/exponent"], ranges.get(f"{name}/exponent")) for name in approaches},
        parabolas=parabolas,
        envelope=frontier.envelope(kept),
        predictions={name: allocations(name, range(len(budgets))) for name in approaches},
        curves={name: allocations(name, range(len(budgets), len(grid))) for name in approaches},
        bias=bias,
        held_out=uncertainty.roll_out(kept, fit),
        speedups=speedups,
        warnings=[*warnings, *_warnings(kept, fit, parabolas, bias, budgets)],
    )


def _falls(rows: Observations, law: Law) -> bool:
    """True if a law's loss falls with N and with D over the range of the rows."""
    params, tokens = (np.array([x.min(), x.max()]) for x in (rows.params, rows.tokens))
    losses = law.loss(params, tokens[[0, 0]]), law.loss(params[[0, 0]], tokens)
    return all(first - last > _MIN_FALL * first for first, last in losses)


def _statistics(rows: Observations, fit: Fit, budgets: Sequence[float], is_point: bool = False) -> dict[str, float]:
    """Values of all approaches by name: of the fitted rows, or of a resample, whose law begins at the fit's."""
    law = fit.law if is_point else refit(rows, fit)
    values = {**in_units(law, fit.units), "params_exponent": law.params_exponent}
    values["parametric/exponent"] = law.params_exponent
    for i, flops in enumerate(budgets):
        optimum = law.optimum(flops, rows.flops_ratio)
        values |= {f"parametric/{name}/{i}": getattr(optimum, name) for name in ("params", "tokens", "loss")}
    frontiers: dict[str, Frontier | None] = {
        "isoflop": frontier.isoflop_frontier(frontier.fit_parabolas(rows)),
        "envelope": frontier.envelope_frontier(rows),
    }
    for name, laws in frontiers.items():
        if laws is not None:
            values[f"{name}/exponent"] = laws.params.exponent
            for i, flops in enumerate(budgets):
                values |= {f"{name}/params/{i}": laws.params(flops), f"{name}/tokens/{i}": laws.tokens(flops)}
    return values


def _warnings(
    rows: Observations, fit: Fit, parabolas: Sequence[Parabola], bias: Sequence[float], budgets: Sequence[float]
) -> list[str]:
    """Reasons to doubt the fit, a line each."""
    warnings = []
    if fit.share_of_inits < _MIN_SHARE:
        warnings.append(
            f"{fit.share_of_inits:.1%} of {fit.inits} starts reach the optimum; there may be a better one: more --inits"
        )
    if vanished := [name for name in fit.law.scales if fit.law.values[name] < 1e-6]:
        warnings.append(f"{vanished[0]} is {fit.law.values[vanished[0]]:.2g}: these rows do not determine it")
    ratio = rows.flops / (rows.params * rows.tokens)
    if ratio.max() > _MAX_RATIO_SPREAD * ratio.min():
        warnings.append(
            f"C / (N·D) is {ratio.min():.3g} to {ratio.max():.3g}: N* and D* are of its median, {rows.flops_ratio:.3g}"
        )
    used = [parabola for parabola in parabolas if not parabola.problem]
    worst = max(range(len(bias)), key=lambda i: abs(bias[i]), default=None)
    if worst is not None and used and abs(bias[worst]) > _MAX_BIAS:
        offset = max((p.center_offset for p in used), key=lambda factor: abs(math.log(factor)))
        width = max(p.highest / p.lowest for p in used)
        warnings.append(
            "IsoFLOP minima are biased on this grid, without any noise: parabolas through the law's own losses miss "
            f"its N* for {budgets[worst]:.3g} FLOPs by {bias[worst]:+.0%}: sizes are centered up to {offset:.2g} × "
            f"off the minimum and span {width:.2g} ×; rely on the parametric approach"
        )
    if outside := [p for p in parabolas if "outside" in p.problem]:
        warnings.append(
            f"the IsoFLOP minimum of {len(outside)} of {len(parabolas)} budgets is outside of the sizes sampled "
            f"(budget {outside[0].flops:.3g}: {outside[0].problem}); not used"
        )
    if (reach := max(budgets) / rows.flops.max()) > _MAX_REACH * 1.01:
        warnings.append(
            f"{max(budgets):.3g} FLOPs is {reach:.3g} × the largest budget: intervals know of no such reach"
        )
    return warnings
