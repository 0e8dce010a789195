"""Comparison of two checkpoints of one model by their activations and logits, one layer at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lvm.common.errors import UserError
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.model.nnx_utils import Params, abstract_module, merge
from lvm.model.transformer import Layer, ModelConfig, RMSNorm, RopeCosSin, rope_cos_sin

_CHUNK = 256  # positions whose logits are in memory at once
_REPORTED = (0, 1, 10, 100, 1000)  # positions in the report, beside the last


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences of two models, computed in float32.

    Attributes:
      max_abs_diff: the largest absolute difference of a code's logit at each position.
      logit_std: the standard deviation of the first model's logits.
      kl: the mean KL(first ‖ second) over the codes at each position, in nats.
      first_difference: the first module whose output isn't bit-identical, "embedding", "layer 3", …; None if all are.
      relative_difference: its largest difference, divided by the root mean square of the output.
    """

    max_abs_diff: Float[np.ndarray, " T"]
    logit_std: float
    kl: Float[np.ndarray, " T"]
    first_difference: str | None
    relative_difference: float

    def report(self) -> Iterator[str]:
        """Yields the lines of a report."""
        worst, last = int(self.max_abs_diff.argmax()), len(self.max_abs_diff) - 1
        yield (
            f"max logit difference: {self.max_abs_diff[worst]:.3g} at position {worst} "
            f"(standard deviation of logits: {self.logit_std:.3g})"
        )
        yield f"KL divergence: {self.kl.mean():.3g} nats a code, {self.kl.max():.3g} at the worst position"
        positions = [*(position for position in _REPORTED if position < last), last]
        differences = (f"{position}: {self.max_abs_diff[position]:.3g}" for position in positions)
        yield f"max logit difference by position: {', '.join(differences)}"
        relative = f" (relative difference {self.relative_difference:.3g})" if self.first_difference else ""
        yield f"first difference: {self.first_difference or 'none'}{relative}"


def compare(first: LazyCheckpoint, second: LazyCheckpoint, num_rows: int = 2, seed: int = 0) -> Comparison:
    """Runs both models on the same random codes, up to the shorter context; only logits of codes are compared.

    Raises UserError if the models differ in hidden size, number of layers or number of codes.
    """
    _check_sizes(first, second)
    num_codes, T = first.vocabulary.num_codes, min(first.config.context, second.config.context)
    tokens = np.random.default_rng(seed).integers(0, num_codes, (num_rows, T))
    models = (first, second)
    hidden = [jnp.asarray(m.tensors["embedding"].read().astype(np.float32)[tokens]) for m in models]  # [B, T, D]
    difference = _difference("embedding", *hidden)
    for i in range(first.config.num_layers):
        hidden = [_run_layer(model, i, x) for model, x in zip(models, hidden, strict=True)]  # [B, T, D]
        difference = difference or _difference(f"layer {i}", *hidden)
    hidden = [_normalize(model, x) for model, x in zip(models, hidden, strict=True)]  # [B, T, D]
    difference = difference or _difference("final norm", *hidden)
    heads = [_load_head(model)[:, :num_codes] for model in models]  # [D, K]
    chunks = [
        jax.device_get(_compare_logits(*(x[:, start : start + _CHUNK] for x in hidden), *heads))
        for start in range(0, T, _CHUNK)
    ]
    max_abs_diff, kl = (np.concatenate([chunk[i] for chunk in chunks]) for i in range(2))
    if difference is None and max_abs_diff.any():
        difference = "output projection", float(max_abs_diff.max())
    variance = sum(float(chunk[2]) for chunk in chunks) / (num_rows * T)
    return Comparison(max_abs_diff, variance**0.5, kl, *(difference or (None, 0.0)))


def _check_sizes(first: LazyCheckpoint, second: LazyCheckpoint) -> None:
    sizes = [(m.config.hidden_size, m.config.num_layers, m.vocabulary.num_codes) for m in (first, second)]
    pairs = zip(("hidden_size", "num_layers", "num_codes"), *sizes, strict=True)
    different = [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]
    if different:
        raise UserError(f"{first.path} and {second.path}: not the same model ({'; '.join(different)})")


def _run_layer(model: LazyCheckpoint, index: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = dataclasses.replace(model.config, dtype="float32")
    rope = rope_cos_sin(jnp.arange(x.shape[1])[None], config.head_dim, config.rope_theta)
    return _layer_function(config)(model.load_layer(index), x, rope)


@functools.lru_cache(maxsize=4)
def _layer_function(config: ModelConfig) -> Callable[[Params, jax.Array, RopeCosSin], jax.Array]:
    graphdef, _ = abstract_module(lambda rngs: Layer(config, rngs))

    @jax.jit
    def run(params: Params, x: jax.Array, rope: RopeCosSin) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return merge(graphdef, params)(x, rope, "xla")

    return run


def _normalize(model: LazyCheckpoint, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    graphdef, _ = abstract_module(lambda rngs: RMSNorm(model.config.hidden_size, model.config.norm_epsilon))
    scale = jnp.asarray(model.tensors["norm.scale"].read(), jnp.float32)
    return merge(graphdef, {"scale": scale})(x)


def _load_head(model: LazyCheckpoint) -> Float[Array, "D V"]:
    is_tied = model.config.tie_embeddings
    array = model.tensors["embedding" if is_tied else "head"].read().astype(np.float32)
    return jnp.asarray(array.T if is_tied else array)


@jax.jit
def _compare_logits(
    x: Float[Array, "B T D"], y: Float[Array, "B T D"], head_x: Float[Array, "D K"], head_y: Float[Array, "D K"]
) -> tuple[Float[Array, " T"], Float[Array, " T"], Float[Array, ""]]:
    """Returns the largest absolute difference, the mean KL divergence, and the sum of the logits' variances."""
    with jax.default_matmul_precision("highest"):
        a, b = x @ head_x, y @ head_y  # [B, T, K]
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)  # [B, T, K]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)  # [B, T]
    return jnp.abs(a - b).max((0, 2)), jnp.maximum(kl, 0).mean(0), jnp.var(a, -1).sum()


def _difference(name: str, x: jax.Array, y: jax.Array) -> tuple[str, float] | None:
    largest = float(jnp.abs(x - y).max())
    return (name, largest / max(float(jnp.sqrt(jnp.mean(x * x))), 1e-30)) if largest else None
