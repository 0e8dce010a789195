"""Usage and perplexity of a codebook over a sliding window of steps."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvm.common import statistics
from lvm.model.nnx_utils import Params

WINDOW = 500_000  # codes that a full window holds at least; at most one slot more
_SLOTS = 8  # the window is a ring of so many histograms


def init_window(codebook_size: int) -> Params:
    """An empty window: `counts` int32 [slots, K]."""
    return {"counts": jnp.zeros((_SLOTS, codebook_size), jnp.int32)}


def update_window(window: Params, codes: Int[Array, "*n"], step: Int[Array, ""], window_size: int = WINDOW) -> Params:
    """Counts a step's codes."""
    steps_per_slot = -(-window_size // ((_SLOTS - 1) * codes.size))
    slot = step // steps_per_slot % _SLOTS
    counts, K = window["counts"], window["counts"].shape[1]
    kept = jnp.where(step % steps_per_slot == 0, 0, counts[slot])
    return {"counts": counts.at[slot].set(kept + jnp.bincount(codes.reshape(-1), length=K))}


def window_metrics(window: Params) -> dict[str, Float[Array, ""]]:
    """`codebook_usage`, the share of codes that occur, and `codebook_perplexity`, exp(entropy in nats)."""
    counts = window["counts"].sum(0).astype(jnp.float32)  # [K]
    return {"codebook_usage": usage(counts), "codebook_perplexity": statistics.perplexity(counts)}


def usage(counts: Float[Array, " K"]) -> Float[Array, ""]:
    """Share of codes that occur."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def expected_of_uniform(codebook_size: int, num_codes: int) -> tuple[float, float]:
    """Usage and perplexity that are expected of `num_codes` independent, uniformly distributed codes.

    Of K codes, 1 − (1 − 1/K)ⁿ occur. The perplexity is exp of the expected plug-in entropy,
    −K·E[c/n · log(c/n)] with a code's count c distributed as binomial (n, 1/K).
    """
    import scipy.stats  # takes a second, which a start of training need not wait for

    K, n = codebook_size, num_codes
    spread = 12 * math.sqrt(n / K) + 40  # the rest of the distribution is below 1e-30
    counts = np.arange(max(1, math.floor(n / K - spread)), min(n, math.ceil(n / K + spread)) + 1)
    shares = counts / n
    entropy = -K * np.sum(scipy.stats.binom.pmf(counts, n, 1 / K) * shares * np.log(shares))
    return -math.expm1(n * math.log1p(-1 / K)) if K > 1 else 1.0, math.exp(entropy)
