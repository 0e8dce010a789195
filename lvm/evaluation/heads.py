"""Heads on frozen features: nearest neighbors, linear, attentive.

Each is fitted on features that `standardize` has normalized by the mean and variance of the samples it is fitted on:
batch normalization without affine parameters and with exact statistics.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.optimize
import scipy.special
from jaxtyping import Array, Float, Integer
from threadpoolctl import ThreadpoolController

EPSILON = 1e-6  # added to variances
_GRADIENT_TOLERANCE = 1e-9  # of the mean loss: two fits of the same data agree to the digits of their figures
_MAX_ITERATIONS = 500
_LEARNING_RATE, _WEIGHT_DECAY, _BATCH = 3e-3, 0.05, 32  # of attentive heads
_PREDICTED_AT_ONCE = 256

Samples = Float[np.ndarray, "n D"]
Labels = Integer[np.ndarray, " n"]


class Normalization(NamedTuple):
    """Mean and scale of each feature."""

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]

    def __call__(self, x: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
        return (x - self.mean) * self.scale


def standardize(x: Float[np.ndarray, "*n D"]) -> Normalization:
    """The normalization of these samples: x ↦ (x − mean) / √(variance + ε), and 0 of a feature that doesn't vary."""
    flat = x.reshape(-1, x.shape[-1])
    variance = flat.var(0, dtype=np.float64)
    mean, scale = flat.mean(0, dtype=np.float64), np.where(variance > 0, 1 / np.sqrt(variance + EPSILON), 0)
    return Normalization(mean.astype(x.dtype), scale.astype(x.dtype))


def _in_span(x: Samples) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "D d"] | None]:
    """Coordinates of fewer samples than features in an orthonormal basis of a space that has them, and the basis.

    Weights of least norm, which a penalty of |weights|² selects, are in the samples' span: the basis times those of the
    coordinates, of the same norm. Without it D × D matrices wouldn't fit memory. Other samples are returned as given.
    """
    if x.shape[1] <= len(x):
        return x, None
    basis, coordinates = scipy.linalg.qr(x.T, mode="economic")
    return coordinates.T, basis


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # lists the process's libraries, which takes longer than a small fit


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """x ↦ x · weights + bias, in float64; columns are classes, or the one value of a regression."""

    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]
    classes: Labels | None = None  # of the columns

    def scores(self, x: Samples) -> Float[np.ndarray, "n C"]:
        return x.astype(np.float64) @ self.weights + self.bias

    def __call__(self, x: Samples) -> np.ndarray:
        """The most likely class of each sample, or its value, [n]."""
        scores = self.scores(x)
        return scores[:, 0] if self.classes is None else self.classes[scores.argmax(1)]


def fit_logistic(x: Samples, labels: Labels, l2: float) -> LinearHead:
    """Multinomial logistic regression: minimizes the mean cross-entropy + l2/2 · |weights|².

    The minimum of scikit-learn's `LogisticRegression(C=1 / (l2 · n))`; of two classes, that of
    `C=2 / (l2 · n)`, which has one column of weights for the difference. Classes without a sample are never answered.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    n, C = len(x), len(classes)
    if C == 1:
        return LinearHead(np.zeros((x.shape[1], 1)), np.zeros(1), classes)
    x, basis = _in_span(x.astype(np.float64))
    # L-BFGS runs in coordinates in which the features are uncorrelated: an order of magnitude fewer iterations.
    root = scipy.linalg.cholesky(x.T @ x / n + C * l2 * np.eye(x.shape[1]), lower=True)
    white = scipy.linalg.solve_triangular(root, x.T, lower=True).T  # [n, D]
    one_hot = np.eye(C)[targets]

    def weights_of(v: np.ndarray) -> np.ndarray:
        return scipy.linalg.solve_triangular(root, v[:-1], lower=True, trans="T")

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        v = flat.reshape(-1, C)
        weights = weights_of(v)
        log_p = scipy.special.log_softmax(white @ v[:-1] + v[-1], axis=1)
        loss = -np.sum(log_p * one_hot) / n + l2 / 2 * np.sum(weights**2)
        residual = (np.exp(log_p) - one_hot) / n
        decay = scipy.linalg.solve_triangular(root, l2 * weights, lower=True)
        return loss, np.concatenate([white.T @ residual + decay, residual.sum(0)[None]]).ravel()

    start = np.zeros((x.shape[1] + 1) * C)
    options = {"gtol": _GRADIENT_TOLERANCE, "ftol": 0.0, "maxiter": _MAX_ITERATIONS, "maxcor": 20}
    with _threads().limit(limits=1):  # threads take many times the time of products with so few columns
        result = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    v = result.x.reshape(-1, C)
    weights = weights_of(v)
    return LinearHead(weights if basis is None else basis @ weights, v[-1], classes)


def fit_ridge(x: Samples, values: Float[np.ndarray, " n"], l2: float) -> LinearHead:
    """Ridge regression in closed form: minimizes the mean of (y − x·w − b)² + l2 · |w|².

    The minimum of scikit-learn's `Ridge(alpha=l2 · n)`.
    """
    x, y = x.astype(np.float64), values.astype(np.float64)
    mean, bias = x.mean(0), y.mean()
    centered, basis = _in_span(x - mean)
    gram = centered.T @ centered / len(x) + l2 * np.eye(centered.shape[1])
    weights = scipy.linalg.solve(gram, centered.T @ (y - bias) / len(x), assume_a="pos")
    weights = weights if basis is None else basis @ weights
    return LinearHead(weights[:, None], np.array([bias - mean @ weights]))


def predict_neighbors(
    fitted: Samples, labels: Labels, x: Float[np.ndarray, "m D"], neighbors: int = 20, temperature: float = 0.07
) -> Integer[np.ndarray, " m"]:
    """Votes of the nearest fitted samples by cosine similarity s, each of weight exp(s / temperature), as in DINO.

    Caron et al., arXiv 2104.14294; `labels` are at least 0. Fewer samples than `neighbors` all vote.
    """
    fitted, x = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (fitted, x))
    answers = np.empty(len(x), labels.dtype)
    for start in range(0, len(x), _PREDICTED_AT_ONCE):
        similarity = x[start : start + _PREDICTED_AT_ONCE] @ fitted.T  # [B, n]
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbors]
        votes = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
        totals = np.stack([np.sum(votes * (labels[nearest] == c), axis=1) for c in range(labels.max() + 1)], axis=1)
        answers[start : start + _PREDICTED_AT_ONCE] = totals.argmax(1)
    return answers


class AttentiveParams(NamedTuple):
    """An attentive head's parameters, without biases: H heads of size d = D / H."""

    query: Float[Array, "H d"]
    key: Float[Array, "D H d"]
    value: Float[Array, "D H d"]
    out: Float[Array, "D C"]


def attend(params: AttentiveParams, x: Float[Array, "B N D"]) -> Float[Array, "B C"]:
    """Scores of AIM's attentive probe (El-Nouby et al., arXiv 2401.08541) on normalized features.

    For each head h: softmax over n of query_h · (x_n key_h) / √d, weights of the values x_n value_h; the heads'
    averages, concatenated, times `out`. One query makes keys and values linear in x: the query is multiplied with
    the key's matrix, and x is averaged before it is multiplied with the value's, which costs D / H times less.
    """
    scale = params.query.shape[1] ** -0.5
    directions = jnp.einsum("dhk,hk->dh", params.key, params.query) * scale  # [D, H]
    weights = jax.nn.softmax(x @ directions, axis=1)  # [B, N, H]
    averages = jnp.einsum("bnh,bnd->bhd", weights, x)
    pooled = jnp.einsum("bhd,dhk->bhk", averages, params.value)
    return pooled.reshape(len(x), -1) @ params.out


def init_attentive(rng: np.random.Generator, D: int, num_heads: int, num_classes: int) -> AttentiveParams:
    """Initial parameters as in AIM's code: PyTorch's of linear layers, a query of standard deviation 0.02."""
    bound, shape = D**-0.5, (D, num_heads, D // num_heads)
    query = rng.normal(0, 0.02, shape[1:])
    matrices = (rng.uniform(-bound, bound, size) for size in (shape, shape, (D, num_classes)))
    return AttentiveParams(*(jnp.asarray(x, jnp.float32) for x in (query, *matrices)))


@dataclasses.dataclass(frozen=True)
class AttentiveHead:
    """An attentive head with the normalization of its features."""

    normalization: Normalization
    params: AttentiveParams

    def __call__(self, x: Float[np.ndarray, "n N D"]) -> Labels:
        """The most likely class of each image."""
        parts = [x[i : i + _PREDICTED_AT_ONCE] for i in range(0, len(x), _PREDICTED_AT_ONCE)]
        return np.concatenate([np.asarray(_scores(self.params, self.normalization(part))) for part in parts]).argmax(1)


def fit_attentive(
    x: Float[np.ndarray, "n N D"], indices: Integer[np.ndarray, " m"], labels: Labels, num_classes: int,
    num_heads: int, steps: int, seed: int,
) -> AttentiveHead:  # fmt: skip
    """Trains an attentive head with AdamW on the samples `indices` of `x`, whose labels `labels` [n] has.

    Batches of 32, learning rate 3e-3 with cosine decay, weight decay 0.05.
    """
    normalization = standardize(x[indices])
    rng = np.random.default_rng(seed)
    batches = rng.choice(indices, (steps, _BATCH))
    params = init_attentive(rng, x.shape[-1], num_heads, num_classes)
    # All samples, of whatever fold: one program, whose only changing shape is that of `out`.
    return AttentiveHead(normalization, _train(params, normalization(x), batches, labels[batches]))


_scores = jax.jit(attend)


@jax.jit
def _train(params: AttentiveParams, x: Array, batches: Array, labels: Array) -> AttentiveParams:
    optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, len(batches)), weight_decay=_WEIGHT_DECAY)

    def loss(params: AttentiveParams, indices: Array, targets: Array) -> Array:
        scores = attend(params, x[indices])
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()

    def step(carry: tuple[AttentiveParams, optax.OptState], batch: tuple[Array, Array]) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), (batches, labels))[0][0]
