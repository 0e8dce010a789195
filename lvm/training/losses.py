"""Cross-entropy over a large vocabulary, without all of its logits at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lvm.hardware import sharding


def token_losses(
    hidden: jax.Array, projection: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Losses of hidden states under the output projection; logits exist for `chunk` tokens of a row at a time.

    The backward pass computes a chunk's logits again. Under a mesh every device works on its own rows, its own
    part of each row and its own part of the vocabulary; the projection is gathered over `fsdp` once, in the
    compute dtype, and its gradient is summed over the chunks in float32, then over devices once, in the compute dtype.

    Args:
      hidden: normed, [B, T, D] in the compute dtype.
      projection: float32 [D, V].
      targets: int32 [B, T].
      chunk: tokens of a row; where it doesn't divide a device's part of the row, the last chunk is padded.

    Returns:
      Negative log-likelihoods and log-normalisers (the log of the sum of exponentiated logits), float32 [B, T].
    """
    if sharding.current_mesh() is None:
        return _by_chunks(
            hidden, projection.astype(hidden.dtype).astype(jnp.float32), targets, chunk, _normalise
        )
    rows = sharding.partition_spec(("batch", "length"))
    return jax.shard_map(
        functools.partial(_on_each_device, chunk=chunk),
        in_specs=(PartitionSpec(*rows, None), sharding.partition_spec(("embed", "vocabulary")), rows),
        out_specs=(rows, rows),
    )(hidden, projection, targets)


def _on_each_device(hidden: Any, projection: Any, targets: Any, chunk: int) -> tuple[jax.Array, jax.Array]:
    # Said to differ between devices before it is gathered and before the loop over chunks: its gradient is then first
    # summed over the chunks, then cut into each device's part, and only such parts are summed over the other axes.
    projection = jax.lax.pcast(projection.astype(hidden.dtype), ("data", "sequence"), to="varying")
    gathered = jax.lax.all_gather(projection, "fsdp", axis=0, tiled=True).astype(jnp.float32)  # [D, V/tensor]
    hidden = jax.lax.pcast(hidden, "tensor", to="varying")
    return _by_chunks(hidden, gathered, targets, chunk, _normalise_split)


def _by_chunks(
    hidden: jax.Array, projection: jax.Array, targets: jax.Array, chunk: int, normalise: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """`projection` has the compute dtype's values in float32, so that its gradients add up over chunks in float32."""
    B, T, D = hidden.shape
    chunk = min(chunk, T)
    num_chunks = -(-T // chunk)
    padding = num_chunks * chunk - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def losses(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return normalise(_logits(hidden, projection), targets)

    def body(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, losses(*part)

    by_chunk = (
        hidden.reshape(B, num_chunks, chunk, D).swapaxes(0, 1),
        targets.reshape(B, num_chunks, chunk).swapaxes(0, 1),
    )
    _, (nll, log_z) = jax.lax.scan(body, None, by_chunk)  # [num_chunks, B, c]
    whole = lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :T]  # noqa: E731
    return whole(nll), whole(log_z)


@jax.custom_vjp
def _logits(hidden: jax.Array, projection: jax.Array) -> jax.Array:
    """hidden [B, c, D], projection [D, V] → float32 [B, c, V], factors in the dtype of `hidden`.

    Its gradients are products of factors in that dtype too; left to themselves they would take the logits' float32.
    """
    return jnp.matmul(hidden, projection.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _logits_forward(hidden: Any, projection: Any) -> tuple[jax.Array, Any]:
    return _logits(hidden, projection), (hidden, projection)


def _logits_backward(saved: Any, gradient: Any) -> tuple[jax.Array, jax.Array]:
    hidden, projection = saved
    gradient = gradient.astype(hidden.dtype)  # [B, c, V]
    to_hidden = jnp.matmul(gradient, projection.astype(hidden.dtype).T)  # [B, c, D]
    to_projection = jnp.einsum("bcd,bcv->dv", hidden, gradient, preferred_element_type=jnp.float32)
    return to_hidden, to_projection


_logits.defvjp(_logits_forward, _logits_backward)


def _normalise(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits float32 [B, c, V], targets [B, c] → losses and log-normalisers [B, c]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _normalise_split(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same where each device along `tensor` has the logits of its own ids."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(logits).max(-1), "tensor")  # [B, c]
    total = jax.lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), "tensor")
    log_z = jnp.log(total) + largest
    here = targets - jax.lax.axis_index("tensor") * logits.shape[-1]
    mine = (here >= 0) & (here < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(mine, here, 0)[..., None], axis=-1)[..., 0]
    return log_z - jax.lax.psum(jnp.where(mine, chosen, 0.0), "tensor"), log_z
