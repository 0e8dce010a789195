"""Chunked cross-entropy: the logits of a large vocabulary are never all in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lvm.hardware import sharding

Losses = tuple[Float[Array, "B T"], Float[Array, "B T"]]  # negative log-likelihoods and log-normalizers


def token_losses(
    hidden: Float[Array, "B T D"], projection: Float[Array, "D V"], targets: Int[Array, "B T"], chunk: int
) -> Losses:
    """Losses of hidden states under the output projection, with logits of `chunk` tokens a row at a time.

    The backward pass recomputes each chunk's logits. Under a mesh each device works on its own shard of rows, length
    and vocabulary. The projection is gathered over `fsdp` once, in the compute dtype; its gradient is summed over
    chunks in float32, then reduced over devices once, in the compute dtype.

    Args:
      hidden: normalized, in the compute dtype.
      projection: float32.
      targets: token ids.
      chunk: tokens of a row; if it doesn't divide a device's shard of the row, the last chunk is padded.

    Returns:
      Negative log-likelihoods and log-normalizers (log-sum-exp of the logits), float32.
    """
    if sharding.current_mesh() is None:
        projection = projection.astype(hidden.dtype).astype(jnp.float32)
        return _chunked_losses(hidden, projection, targets, chunk, _losses)
    rows = sharding.partition_spec(("batch", "length"))
    return jax.shard_map(
        functools.partial(_sharded_losses, chunk=chunk),
        in_specs=(PartitionSpec(*rows, None), sharding.partition_spec(("embed", "vocabulary")), rows),
        out_specs=(rows, rows),
    )(hidden, projection, targets)


def _sharded_losses(hidden: Array, projection: Array, targets: Array, chunk: int) -> Losses:
    # Marked device-varying (`pcast`) before the all-gather and the loop over chunks, so that the gradient is summed
    # over chunks first and the transpose of the gather is a reduce-scatter.
    projection = jax.lax.pcast(projection.astype(hidden.dtype), ("data", "sequence"), to="varying")
    gathered = jax.lax.all_gather(projection, "fsdp", axis=0, tiled=True).astype(jnp.float32)  # [D, V/tensor]
    hidden = jax.lax.pcast(hidden, "tensor", to="varying")
    return _chunked_losses(hidden, gathered, targets, chunk, _vocabulary_parallel_losses)


def _chunked_losses(
    hidden: Float[Array, "B T D"],
    projection: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
    losses_of_logits: Callable[[Array, Array], tuple[Array, Array]],
) -> Losses:
    """Scans over chunks; `projection` is float32 so that its gradient accumulates in float32."""
    B, T, _ = hidden.shape
    chunk = max(1, min(chunk, T))
    num_chunks = -(-T // chunk)
    padding = num_chunks * chunk - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def losses(hidden: Array, targets: Array) -> tuple[Array, Array]:
        return losses_of_logits(_logits(hidden, projection), targets)

    chunks = [x.reshape(B, num_chunks, chunk, *x.shape[2:]).swapaxes(0, 1) for x in (hidden, targets)]
    _, (nll, log_z) = jax.lax.scan(lambda _, xs: (None, losses(*xs)), None, chunks)  # [num_chunks, B, c]
    unchunk = lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :T]  # noqa: E731
    return unchunk(nll), unchunk(log_z)


@jax.custom_vjp
def _logits(hidden: Float[Array, "B c D"], projection: Float[Array, "D V"]) -> Float[Array, "B c V"]:
    """float32 logits of factors in the dtype of `hidden`.

    Its gradients multiply in that dtype too; autodiff would multiply in the float32 of the logits.
    """
    return jnp.matmul(hidden, projection.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _logits_forward(hidden: Array, projection: Array) -> tuple[Array, Any]:
    return _logits(hidden, projection), (hidden, projection)


def _logits_backward(residuals: Any, gradient: Float[Array, "B c V"]) -> tuple[Array, Array]:
    hidden, projection = residuals
    gradient = gradient.astype(hidden.dtype)
    to_hidden = jnp.matmul(gradient, projection.astype(hidden.dtype).T)  # [B, c, D]
    to_projection = jnp.einsum("bcd,bcv->dv", hidden, gradient, preferred_element_type=jnp.float32)
    return to_hidden, to_projection


_logits.defvjp(_logits_forward, _logits_backward)


def _losses(logits: Float[Array, "B c V"], targets: Int[Array, "B c"]) -> tuple[Array, Array]:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _vocabulary_parallel_losses(logits: Float[Array, "B c V"], targets: Int[Array, "B c"]) -> tuple[Array, Array]:
    """`_losses` with the vocabulary sharded over `tensor`."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(logits).max(-1), "tensor")  # [B, c]
    total = jax.lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), "tensor")
    log_z = jnp.log(total) + largest
    local = targets - jax.lax.axis_index("tensor") * logits.shape[-1]
    is_local = (local >= 0) & (local < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(is_local, local, 0)[..., None], axis=-1)[..., 0]
    return log_z - jax.lax.psum(jnp.where(is_local, chosen, 0.0), "tensor"), log_z
