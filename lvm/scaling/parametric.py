"""Fits of a law to observations (Chinchilla's third approach, arXiv 2203.15556).

Methods:

- `huber`: Huber loss of the log residuals, summed, by L-BFGS from a grid of starts (arXiv 2203.15556, 2404.10102).
- `kaplan`: the same for Kaplan's law.
- `variable_projection`: squared residuals of the loss; for each (alpha, beta) the best E, A, B ≥ 0 are a linear problem
  (Golub and Pereyra 1973), so that the search has two dimensions. A and B are of N in millions and D in billions.
- `variable_projection_huber`: the same with the Huber loss of the residuals.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Mapping

import numpy as np
import scipy.optimize
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from lvm.common.errors import UserError
from lvm.scaling.laws import ChinchillaLaw, KaplanLaw, Law
from lvm.scaling.observations import Observations

METHODS = ("huber", "variable_projection", "variable_projection_huber", "kaplan")
EXPONENT_STARTS = np.array(list(itertools.product((0.1, 0.2, 0.35, 0.5, 0.8), repeat=2)))
_CONVERGED = 1e-4  # relative distance of an objective from the best that counts as the same optimum
_LIMITS = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-12}
_PROJECTED_UNITS = (1e6, 1e9)
_POOL_STARTS = 1000  # from which on starts are shared among processes, which take seconds to begin
_CHUNK_STARTS = 50


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
      method: one of `METHODS`.
      delta: where the Huber loss becomes linear: in log loss for `huber` and `kaplan`, else in loss.
      overestimate_penalty, underestimate_penalty: weights of rows whose loss is predicted too high and too low; of
        `huber` and `kaplan`.
      pins: parameter → value that it keeps, such as a known irreducible loss {"E": 1.8}; of `huber` and `kaplan`.
      inits: number of starts, spread over the grid; 0: all of it.
    """

    method: str = "huber"
    delta: float = 1e-3
    overestimate_penalty: float = 1.0
    underestimate_penalty: float = 1.0
    pins: Mapping[str, float] = dataclasses.field(default_factory=dict)
    inits: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method={self.method} must be one of {', '.join(METHODS)}")
        for name in ("delta", "overestimate_penalty", "underestimate_penalty"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name}={getattr(self, name):g} must be positive")
        if unknown := sorted(self.pins.keys() - set(self.law.names())):
            raise UserError(f"--pin={unknown[0]}: must be one of {', '.join(self.law.names())}")
        if low := [name for name, value in self.pins.items() if not 0 < value < np.inf]:
            raise UserError(f"--pin={low[0]}={self.pins[low[0]]:g} must be a positive number")
        is_weighted = (self.overestimate_penalty, self.underestimate_penalty) != (1.0, 1.0)
        if self.is_projected and (self.pins or is_weighted):
            raise UserError(f"--method={self.method}: pins and penalties have no effect; use huber or kaplan")

    @property
    def law(self) -> type[Law]:
        return KaplanLaw if self.method == "kaplan" else ChinchillaLaw

    @property
    def is_projected(self) -> bool:
        return self.method.startswith("variable_projection")

    @property
    def num_free(self) -> int:
        """Free parameters."""
        return len(self.law.names()) - len(self.pins)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      objective: at the optimum: the sum over rows of squared residuals or Huber losses.
      inits: number of starts.
      share_of_inits: of the starts, those that reached the optimum.
    """

    settings: FitSettings
    law: Law
    objective: float
    inits: int
    share_of_inits: float

    @property
    def units(self) -> tuple[float, float]:
        """Parameters and tokens that A and B count in `coefficients`."""
        return _PROJECTED_UNITS if self.settings.is_projected else (1.0, 1.0)

    @property
    def coefficients(self) -> dict[str, float]:
        """The law's parameters by name, A and B in `units`."""
        return in_units(self.law, self.units)


def in_units(law: Law, units: tuple[float, float]) -> dict[str, float]:
    """The law's parameters, with A and B of N and D in these units."""
    values = dict(law.values)
    if isinstance(law, ChinchillaLaw):
        values |= {"A": law.A * units[0] ** -law.alpha, "B": law.B * units[1] ** -law.beta}
    return values


def log_residuals(law: Law, observations: Observations) -> Float[np.ndarray, " n"]:
    """log of predicted over observed loss: positive where the law overestimates."""
    return np.log(law.loss(observations.params, observations.tokens) / observations.loss)


def objective(law: Law, observations: Observations, settings: FitSettings) -> float:
    """The objective of a law on rows, see `Fit`."""
    return _Problem.of(observations, settings).objective(law.point)[0]


@threadpool_limits.wrap(limits=1)  # threads take 20 × the time of matrices as small as those of L-BFGS
def fit_law(observations: Observations, settings: FitSettings, processes: int | None = None) -> Fit:
    """Fits a law from a grid of starts.

    `processes` share the starts; by default one a core.

    Raises:
      UserError: fewer rows than free parameters, or rows that can't determine them.
    """
    check_observations(observations, settings)
    if settings.is_projected:
        results = _search_exponents(observations, settings)
    else:
        results = _search_all(observations, settings, processes or os.cpu_count() or 1)
    best = results[results[:, 0].argmin()]
    share = float(np.mean(results[:, 0] <= best[0] * (1 + _CONVERGED) + 1e-14))
    problem = _Problem.of(observations, settings)
    point = min((best[1:], problem.polish(best[1:])), key=lambda p: problem.objective(p)[0])
    return Fit(settings, settings.law.from_point(point), problem.objective(point)[0], len(results), share)


def refit(observations: Observations, fit: Fit) -> Law:
    """The law of other rows, from an earlier optimum instead of a grid of starts: for resamples of its rows."""
    problem = _Problem.of(observations, fit.settings)
    if fit.settings.method == "variable_projection":
        return fit.settings.law.from_point(problem.polish(fit.law.point))
    return fit.settings.law.from_point(problem.minimize(fit.law.point)[1:])


def check_observations(observations: Observations, settings: FitSettings) -> None:
    """Raises UserError for rows that can't determine the free parameters."""
    if len(observations) <= settings.num_free:
        raise UserError(
            f"{len(observations)} rows can't determine {settings.num_free} parameters of the law; at least "
            f"{settings.num_free + 1} are required"
        )
    if np.ptp(observations.loss) <= 1e-12 * observations.loss.max():
        raise UserError(f"all {len(observations)} rows have the loss {observations.loss[0]:g}; there is no law to fit")
    if len(np.unique(observations.budgets())) < 2:
        raise UserError(
            f"all {len(observations)} rows are of one compute budget, {np.median(observations.flops):.3g} FLOPs; a law "
            "needs at least 2"
        )
    for name, values in (("params", observations.params), ("tokens", observations.tokens)):
        if len(np.unique(values)) < 3:
            raise UserError(f"{len(np.unique(values))} distinct values of {name}; a power law needs at least 3")


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The objective of a fit as a function of a point (see `Law.log_loss`)."""

    law: type[Law]
    log_params: np.ndarray
    log_tokens: np.ndarray
    loss: np.ndarray
    log_loss: np.ndarray
    in_log: bool  # residuals of log loss, else of loss
    delta: float  # of the Huber loss; inf: squares, twice
    weights: tuple[float, float]  # of overestimates and underestimates
    free: np.ndarray

    @classmethod
    def of(cls, observations: Observations, settings: FitSettings) -> "_Problem":
        o, s = observations, settings
        delta = np.inf if s.method == "variable_projection" else s.delta
        free = np.array([name not in s.pins for name in s.law.names()])
        weights = (s.overestimate_penalty, s.underestimate_penalty)
        logs = np.log(o.params), np.log(o.tokens)
        return cls(s.law, *logs, o.loss, np.log(o.loss), not s.is_projected, delta, weights, free)

    def residuals(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_loss, jacobian = self.law.log_loss(point, self.log_params, self.log_tokens)
        if self.in_log:
            return log_loss - self.log_loss, jacobian
        predicted = np.exp(np.minimum(log_loss, 300.0))
        return predicted - self.loss, jacobian * predicted

    def objective(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of Huber losses, or of squares without the half, and its gradient."""
        residuals, jacobian = self.residuals(point)
        if np.isinf(self.delta):
            return float(residuals @ residuals), 2 * jacobian @ residuals
        clipped = np.maximum(np.minimum(residuals, self.delta), -self.delta)  # np.clip takes twice the time
        terms = clipped * (residuals - 0.5 * clipped)
        if self.weights != (1.0, 1.0):
            weights = np.where(residuals > 0, *self.weights)
            return float(weights @ terms), jacobian @ (weights * clipped)
        return float(terms.sum()), jacobian @ clipped

    def minimize(self, start: np.ndarray) -> np.ndarray:
        """(objective, *point) of the optimum that L-BFGS reaches from `start`."""
        scale = 1.0 if np.isinf(self.delta) else self.delta**-2
        point = start.copy()

        def scaled(values: np.ndarray) -> tuple[float, np.ndarray]:
            point[self.free] = values
            value, gradient = self.objective(point)
            return value * scale, gradient[self.free] * scale

        # L-BFGS stops by the absolute change of values below 1: in units of delta² it does not stop early.
        result = scipy.optimize.minimize(scaled, start[self.free], jac=True, method="L-BFGS-B", options=_LIMITS)
        point[self.free] = result.x
        return np.array([result.fun / scale, *point])

    def polish(self, start: np.ndarray) -> np.ndarray:
        """Gauss-Newton steps from an optimum, to more digits than L-BFGS and simplices reach."""
        if self.weights != (1.0, 1.0):
            return start
        point = start.copy()

        def evaluate(values: np.ndarray, index: int) -> np.ndarray:
            point[self.free] = values
            return self.residuals(point)[index]

        loss = {} if np.isinf(self.delta) else {"loss": "huber", "f_scale": self.delta}
        tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
        with np.errstate(all="ignore"):  # of a parameter that vanishes, whose logarithm diverges
            result = scipy.optimize.least_squares(
                lambda values: evaluate(values, 0), start[self.free], x_scale="jac", max_nfev=200, **tolerances, **loss,
                jac=lambda values: evaluate(values, 1)[self.free].T,
            )  # fmt: skip
        point[self.free] = result.x
        return point


def _search_all(observations: Observations, settings: FitSettings, processes: int) -> np.ndarray:
    """(objective, *point) from each start."""
    starts = settings.law.starts()
    if 0 < settings.inits < len(starts):
        # A step of the grid would miss some values of its innermost dimensions.
        starts = starts[np.random.default_rng(0).permutation(len(starts))[: settings.inits]]
    for index, name in enumerate(settings.law.names()):
        if name in settings.pins:
            value = settings.pins[name]
            starts[:, index] = np.log(value) if name in settings.law.scales else value
    starts = np.unique(starts, axis=0)  # a pinned parameter makes starts equal
    problem = _Problem.of(observations, settings)
    if processes == 1 or len(starts) < _POOL_STARTS:
        return _minimize_all(problem, starts)
    chunks = np.array_split(starts, len(starts) // _CHUNK_STARTS)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return np.concatenate(list(pool.map(functools.partial(_minimize_all, problem), chunks)))


def _minimize_all(problem: _Problem, starts: np.ndarray) -> np.ndarray:
    with threadpool_limits(1):  # of this process, which may be one of a pool
        return np.array([problem.minimize(start) for start in starts])


def _search_exponents(observations: Observations, settings: FitSettings) -> np.ndarray:
    """(objective, *point) from each start of (alpha, beta), by the simplex method on the projected objective."""
    project = functools.partial(_project, observations, settings)
    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 2000}
    starts = EXPONENT_STARTS
    if 0 < settings.inits < len(starts):
        starts = starts[np.random.default_rng(0).permutation(len(starts))[: settings.inits]]
    rows = []
    for start in starts:
        result = scipy.optimize.minimize(lambda x: project(x)[0], start, method="Nelder-Mead", options=options)
        E, A, B = project(result.x)[1]
        A, B = A * _PROJECTED_UNITS[0] ** result.x[0], B * _PROJECTED_UNITS[1] ** result.x[1]
        rows.append([result.fun, *ChinchillaLaw(E, A, B, *result.x.tolist()).point])
    return np.array(rows)


def _project(
    observations: Observations, settings: FitSettings, exponents: Float[np.ndarray, "2"]
) -> tuple[float, Float[np.ndarray, "3"]]:
    """The objective at (alpha, beta), and the best E, A, B ≥ 0 in `_PROJECTED_UNITS`."""
    loss = observations.loss
    sizes = observations.params / _PROJECTED_UNITS[0], observations.tokens / _PROJECTED_UNITS[1]
    columns = np.stack([np.ones_like(loss), *(x**-e for x, e in zip(sizes, exponents, strict=True))], axis=1)
    linear, norm = scipy.optimize.nnls(columns, loss)
    if settings.method == "variable_projection":
        return norm**2, linear
    for _ in range(100):  # iteratively reweighted least squares
        residuals = np.abs(columns @ linear - loss)
        roots = np.sqrt(np.minimum(1.0, settings.delta / np.maximum(residuals, settings.delta)))
        previous = linear
        linear = scipy.optimize.nnls(columns * roots[:, None], loss * roots)[0]
        if np.abs(linear - previous).max() <= 1e-10 * np.abs(linear).max():
            break
    residuals = np.abs(columns @ linear - loss)
    clipped = np.minimum(residuals, settings.delta)
    return float(np.sum(clipped * (residuals - 0.5 * clipped))), linear
