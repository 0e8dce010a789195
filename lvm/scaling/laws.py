"""Laws of the loss L of N parameters and D tokens, and their compute-optimal allocation.

- Chinchilla: L = E + A / N^alpha + B / D^beta (arXiv 2203.15556).
- Kaplan: L = ((N_c / N)^(alpha_n / alpha_d) + D_c / D)^alpha_d (arXiv 2001.08361, equation 1.5).
"""

import abc
import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from lvm.scaling.observations import FLOPS

_MAX_EXPONENT = 300.0  # of e, so that starts far from the optimum neither overflow nor vanish


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The least loss of a budget: FLOPs, parameters N*, tokens D* and their loss."""

    flops: float
    params: float
    tokens: float
    loss: float


class Law(abc.ABC):
    """A law, a frozen dataclass of its parameters.

    Attributes:
      scales: names of the positive parameters that are fitted as logarithms; the others are exponents.
    """

    scales: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def loss(self, params: Float[np.ndarray, " n"], tokens: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Predicted losses in nats."""

    @abc.abstractmethod
    def _terms(self) -> tuple[float, float, float, float]:
        """(A, alpha, B, beta): for a budget, L increases with A / N^alpha + B / D^beta."""

    @property
    @abc.abstractmethod
    def irreducible_loss(self) -> float:
        """The limit of infinite N and D."""

    @property
    @abc.abstractmethod
    def frontier_exponent(self) -> float:
        """a of L* − E ∝ C^−a, for compute-optimal losses L*."""

    @staticmethod
    @abc.abstractmethod
    def log_loss(
        point: Float[np.ndarray, " k"], log_params: Float[np.ndarray, " n"], log_tokens: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "k n"]]:
        """log L and its derivatives by `point`, the parameters in order, `scales` as logarithms."""

    @staticmethod
    @abc.abstractmethod
    def starts() -> Float[np.ndarray, "starts k"]:
        """Grid of points that a fit starts from."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_point(cls, point: Float[np.ndarray, " k"]) -> "Law":
        """The law of a point, see `log_loss`."""
        values = dict(zip(cls.names(), point.tolist(), strict=True))
        return cls(**{name: float(np.exp(v)) if name in cls.scales else v for name, v in values.items()})

    @property
    def values(self) -> Mapping[str, float]:
        """Parameters by name."""
        return {name: getattr(self, name) for name in self.names()}

    @property
    def point(self) -> Float[np.ndarray, " k"]:
        """The inverse of `from_point`; a scale of 0 becomes the smallest positive number."""
        smallest = np.finfo(float).tiny
        return np.array(
            [np.log(max(value, smallest)) if name in self.scales else value for name, value in self.values.items()]
        )

    @property
    def params_exponent(self) -> float:
        """a of N* ∝ C^a; D* ∝ C^(1 − a)."""
        _, alpha, _, beta = self._terms()
        return beta / (alpha + beta)

    def optimum(self, flops: float, flops_ratio: float = FLOPS) -> Optimum:
        """The allocation with the least loss among those with flops_ratio·N·D = `flops`, in closed form."""
        A, alpha, B, beta = self._terms()
        product = flops / flops_ratio
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of a law without N, D or exponents
            # N^(alpha + beta) = alpha·A / (beta·B) · (N·D)^beta
            params = np.exp(np.log(np.float64(alpha * A) / (beta * B) * np.float64(product) ** beta) / (alpha + beta))
            tokens = product / params
            loss = self.loss(np.array([params]), np.array([tokens]))[0]
        return Optimum(flops, float(params), float(tokens), float(loss))

    def flops_to_reach(self, loss: float, flops_ratio: float = FLOPS) -> float:
        """The budget whose optimum has this loss; infinite at or below the irreducible loss."""
        excess = loss - self.irreducible_loss
        if excess <= 0:
            return float("inf")
        reference = self.optimum(1e20, flops_ratio)
        return reference.flops * ((reference.loss - self.irreducible_loss) / excess) ** (1 / self.frontier_exponent)


@dataclasses.dataclass(frozen=True)
class ChinchillaLaw(Law):
    """L = E + A / N^alpha + B / D^beta."""

    scales: ClassVar[tuple[str, ...]] = ("E", "A", "B")

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: Float[np.ndarray, " n"], tokens: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def _terms(self) -> tuple[float, float, float, float]:
        return self.A, self.alpha, self.B, self.beta

    @property
    def irreducible_loss(self) -> float:
        return self.E

    @property
    def frontier_exponent(self) -> float:
        return self.alpha * self.beta / (self.alpha + self.beta)

    @staticmethod
    def log_loss(
        point: Float[np.ndarray, " k"], log_params: Float[np.ndarray, " n"], log_tokens: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "k n"]]:
        e, a, b, alpha, beta = point
        terms = np.empty((5, len(log_params)))
        terms[0] = e
        np.subtract(a, alpha * log_params, out=terms[1])
        np.subtract(b, beta * log_tokens, out=terms[2])
        np.exp(np.maximum(np.minimum(terms[:3], _MAX_EXPONENT), -_MAX_EXPONENT), out=terms[:3])
        total = terms[0] + terms[1] + terms[2]
        terms[:3] /= total
        np.multiply(terms[1], -log_params, out=terms[3])
        np.multiply(terms[2], -log_tokens, out=terms[4])
        return np.log(total), terms

    @staticmethod
    def starts() -> Float[np.ndarray, "starts k"]:
        """4500 points: the grid of arXiv 2203.15556, appendix D.3."""
        logs, exponents = np.arange(0, 26, 5.0), np.arange(0, 2.01, 0.5)
        return np.array(list(itertools.product(np.arange(-1, 1.01, 0.5), logs, logs, exponents, exponents)))


@dataclasses.dataclass(frozen=True)
class KaplanLaw(Law):
    """L = ((N_c / N)^(alpha_n / alpha_d) + D_c / D)^alpha_d, which has no irreducible loss."""

    scales: ClassVar[tuple[str, ...]] = ("N_c", "D_c", "alpha_n", "alpha_d")

    N_c: float
    D_c: float
    alpha_n: float
    alpha_d: float

    def loss(self, params: Float[np.ndarray, " n"], tokens: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return ((self.N_c / params) ** (self.alpha_n / self.alpha_d) + self.D_c / tokens) ** self.alpha_d

    def _terms(self) -> tuple[float, float, float, float]:
        ratio = self.alpha_n / self.alpha_d
        return self.N_c**ratio, ratio, self.D_c, 1.0

    @property
    def irreducible_loss(self) -> float:
        return 0.0

    @property
    def frontier_exponent(self) -> float:
        return self.alpha_n * self.alpha_d / (self.alpha_n + self.alpha_d)

    @staticmethod
    def log_loss(
        point: Float[np.ndarray, " k"], log_params: Float[np.ndarray, " n"], log_tokens: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "k n"]]:
        n_c, d_c = point[:2]
        alpha_n, alpha_d = np.exp(np.clip(point[2:], -20.0, 20.0))
        params_term = np.clip((alpha_n / alpha_d) * (n_c - log_params), -_MAX_EXPONENT, _MAX_EXPONENT)
        total = np.logaddexp(params_term, d_c - log_tokens)
        share = np.exp(params_term - total)
        by_exponents = [share * params_term, total - share * params_term]
        return alpha_d * total, np.stack([alpha_n * share, alpha_d * (1 - share), *(alpha_d * x for x in by_exponents)])

    @staticmethod
    def starts() -> Float[np.ndarray, "starts k"]:
        """576 points around those of arXiv 2001.08361 and far beyond."""
        logs, exponents = np.arange(5.0, 56, 10), np.log([0.03, 0.08, 0.2, 0.5])
        return np.array(list(itertools.product(logs, logs, exponents, exponents)))
