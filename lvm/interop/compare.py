"""Two checkpoints of one model, compared by what they say of the same rows, a layer at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvm.common.errors import UserError
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.model.nnx_utils import Params, abstract_module, merge
from lvm.model.transformer import Layer, ModelConfig, RMSNorm, RopeCosSin, rope_cos_sin

_AT_ONCE = 256  # positions whose logits are in memory together
_SHOWN = (0, 1, 10, 100, 1000)  # positions of the report, and the last one


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs, in float32.

    Attributes:
      max_abs_diff: float32 [T], the largest difference of a code's logit at each position.
      logit_std: the standard deviation of the first model's logits.
      kl: float32 [T], the mean of KL(first ‖ second) over the codes at each position, in nats.
      first_difference: the first part whose output isn't the same bits, "embedding", "layer 3" …; None if none is.
      relative_difference: by how much it differs there, as a share of the output's root mean square.
    """

    max_abs_diff: np.ndarray
    logit_std: float
    kl: np.ndarray
    first_difference: str | None
    relative_difference: float

    def report(self) -> Iterator[str]:
        """The report."""
        worst = int(self.max_abs_diff.argmax())
        yield (
            f"largest difference of a logit: {self.max_abs_diff[worst]:.3g}, at position {worst}; logits spread over "
            f"{self.logit_std:.3g}"
        )
        yield f"KL: {self.kl.mean():.3g} nats a code, {self.kl.max():.3g} at the worst position"
        last = len(self.max_abs_diff) - 1
        shown = [*(position for position in _SHOWN if position < last), last]
        yield "by position: " + ", ".join(
            f"{position}: {self.max_abs_diff[position]:.3g}" for position in shown
        )
        yield f"first layer that differs: {self.first_difference or 'none'}" + (
            f", by {self.relative_difference:.3g} of its output" if self.first_difference else ""
        )


def compare(first: LazyCheckpoint, second: LazyCheckpoint, num_rows: int = 2, seed: int = 0) -> Comparison:
    """Runs both models on the same random codes, as many as both contexts hold; logits of codes alone count.

    Args:
      first, second: of equal hidden size, layers and codes.
      num_rows: of codes.
      seed: draws them.

    Raises:
      UserError: they can't be the same model.
    """
    _check_comparable(first, second)
    num_codes, T = first.vocabulary.num_codes, min(first.config.context, second.config.context)
    tokens = np.random.default_rng(seed).integers(0, num_codes, (num_rows, T))
    models = (first, second)
    hidden = [
        jnp.asarray(m.tensors["embedding"].read().astype(np.float32)[tokens]) for m in models
    ]  # [B, T, D]
    differs, size = _differ("embedding", *hidden)
    for number in range(first.config.num_layers):
        hidden = [_layer(model, number, x) for model, x in zip(models, hidden, strict=True)]  # [B, T, D]
        if differs is None:
            differs, size = _differ(f"layer {number}", *hidden)
    hidden = [_normed(model, x) for model, x in zip(models, hidden, strict=True)]  # [B, T, D]
    if differs is None:
        differs, size = _differ("the norm after the layers", *hidden)
    heads = [_head(model)[:, :num_codes] for model in models]  # [D, K]
    largest, kl, squares = [], [], 0.0
    for start in range(0, T, _AT_ONCE):
        parts = [x[:, start : start + _AT_ONCE] for x in hidden]
        apart, divergence, square = _against(parts[0], heads[0], parts[1], heads[1])
        largest.append(np.asarray(apart))
        kl.append(np.asarray(divergence))
        squares += float(square)
    apart = np.concatenate(largest)
    if differs is None and apart.any():
        differs, size = "the output projection", float(apart.max())
    return Comparison(apart, (squares / (num_rows * T)) ** 0.5, np.concatenate(kl), differs, size)


def _check_comparable(first: LazyCheckpoint, second: LazyCheckpoint) -> None:
    different = [
        f"{name}: {getattr(first.config, name)}, there {getattr(second.config, name)}"
        for name in ("hidden_size", "num_layers")
        if getattr(first.config, name) != getattr(second.config, name)
    ]
    codes = [model.vocabulary.num_codes for model in (first, second)]
    if codes[0] != codes[1]:
        different.append(f"num_codes: {codes[0]}, there {codes[1]}")
    if different:
        raise UserError(f"{first.path} and {second.path}: not one model ({'; '.join(different)})")


def _layer(model: LazyCheckpoint, number: int, x: jax.Array) -> jax.Array:
    """x [B, T, D] → [B, T, D]; one layer of the model is in memory."""
    config = dataclasses.replace(model.config, dtype="float32")
    rope = rope_cos_sin(jnp.arange(x.shape[1])[None], config.head_dim, config.rope_theta)
    return _program(config)(model.load_layer(number), x, rope)


@functools.lru_cache(maxsize=4)
def _program(config: ModelConfig) -> Any:
    graphdef, _ = abstract_module(lambda rngs: Layer(config, rngs))

    @jax.jit
    def run(params: Params, x: jax.Array, rope: RopeCosSin) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return merge(graphdef, params)(x, rope, "xla")

    return run


def _normed(model: LazyCheckpoint, x: jax.Array) -> jax.Array:
    graphdef, _ = abstract_module(lambda rngs: RMSNorm(model.config.hidden_size, model.config.norm_epsilon))
    scale = jnp.asarray(model.tensors["norm.scale"].read(), jnp.float32)
    return merge(graphdef, {"scale": scale})(x)


def _head(model: LazyCheckpoint) -> jax.Array:
    tied = model.config.tie_embeddings
    array = model.tensors["embedding" if tied else "head"].read().astype(np.float32)
    return jnp.asarray(array.T if tied else array)  # [D, V]


@jax.jit
def _against(
    x: jax.Array, head: jax.Array, y: jax.Array, other: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden [B, T, D] and heads [D, K] → largest difference [T], mean KL [T], sum of the logits' variances []."""
    with jax.default_matmul_precision("highest"):
        a, b = x @ head, y @ other  # [B, T, K]
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)  # [B, T, K]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)  # [B, T]
    return jnp.abs(a - b).max((0, 2)), jnp.maximum(kl, 0).mean(0), jnp.var(a, -1).sum()


def _differ(name: str, x: jax.Array, y: jax.Array) -> tuple[str | None, float]:
    largest = float(jnp.abs(x - y).max())
    if largest == 0:
        return None, 0.0
    return name, largest / max(float(jnp.sqrt(jnp.mean(x * x))), 1e-30)
