"""Matrix products with sharded weights: all-gather before the product, reduce-scatter of the gradient.

Left to itself, XLA gathers a matrix once per product it is in and all-reduces the gradients of attention's matrices
instead of reduce-scattering them: a fifth more bytes on the network for the 3b model.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lvm.hardware import sharding


def sharded_matmul(
    x: Float[Array, "B T K"], kernel: Float[Array, "K N"], axes: tuple[str, str]
) -> Float[Array, "B T N"]:
    """x @ kernel in the dtype of `x`.

    Under a mesh the kernel is cast, then gathered over `fsdp`; its gradient is reduced in the same dtype. One of its
    logical `axes` is "embed": if the first, `tensor` splits N (column parallel), else K (row parallel). Batches smaller
    than the mesh, as in generation, are not split.
    """
    kernel = kernel.astype(x.dtype)
    mesh = sharding.current_mesh()
    if mesh is None or x.shape[0] % sharding.axis_size(mesh, ("data", "fsdp")) or x.shape[1] % mesh.shape["sequence"]:
        return x @ kernel
    rows = sharding.partition_spec(("batch", "length"))
    column_parallel = axes[0] == "embed"
    inner = sharding.partition_spec((axes[1] if column_parallel else axes[0],))[0]

    def on_each_device(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Marked device-varying (`pcast`) before the all-gather, so that its transpose is a reduce-scatter.
        kernel = jax.lax.pcast(kernel, ("data", "sequence"), to="varying")
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=0 if column_parallel else 1, tiled=True)
        if column_parallel:
            return jax.lax.pcast(x, "tensor", to="varying") @ kernel
        return jax.lax.psum(x @ kernel, "tensor")

    return jax.shard_map(
        on_each_device,
        in_specs=(PartitionSpec(*rows, None if column_parallel else inner), sharding.partition_spec(axes)),
        out_specs=PartitionSpec(*rows, inner if column_parallel else None),
    )(x, kernel)
