"""Products with matrices that are split over devices: gathered just before, their gradients scattered just after.

Left to itself, XLA gathers a matrix once for every product it is in, and sums gradients of attention's matrices over
all devices instead of giving each device its own part: a fifth more bytes on the network for a model of 3B.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from lvm.hardware import sharding


def sharded_matmul(x: jax.Array, kernel: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x [B, T, K] @ kernel [K, N] → [B, T, N] in the dtype of `x`.

    Under a mesh the kernel is gathered over `fsdp` in that dtype, and its gradient is summed over devices in it. What
    `tensor` splits is the N of a kernel into the model's inner sizes, and the K of one out of them.

    Args:
      x: split over the mesh by its rows and along them.
      kernel: float32.
      axes: its logical axes, of which one is "embed".
    """
    kernel = kernel.astype(x.dtype)
    mesh = sharding.current_mesh()
    rows = sharding.partition_spec(("batch", "length"))
    if mesh is None or _undivided(x, mesh):
        return x @ kernel
    inward = axes[0] == "embed"
    inner = sharding.partition_spec((axes[1] if inward else axes[0],))[0]

    def on_each_device(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Said to differ between devices before it is gathered: its gradient is then cut into each device's part
        # first, and only such parts are summed over the other axes.
        kernel = jax.lax.pcast(kernel, ("data", "sequence"), to="varying")
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=0 if inward else 1, tiled=True)
        if inward:
            return jax.lax.pcast(x, "tensor", to="varying") @ kernel
        return jax.lax.psum(x @ kernel, "tensor")

    return jax.shard_map(
        on_each_device,
        in_specs=(PartitionSpec(*rows, None if inward else inner), sharding.partition_spec(axes)),
        out_specs=PartitionSpec(*rows, inner if inward else None),
    )(x, kernel)


def _undivided(x: jax.Array, mesh: jax.sharding.AbstractMesh) -> bool:
    """Few rows, as in generation, may lie on fewer devices than there are."""
    sizes = mesh.shape
    return bool(x.shape[0] % (sizes["data"] * sizes["fsdp"]) or x.shape[1] % sizes["sequence"])
