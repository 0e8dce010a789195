"""Products with sharded weights: gathered and reduce-scattered where the mesh divides the batch."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvm.hardware import sharding
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.sharded_matmul import sharded_matmul


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
@pytest.mark.parametrize("rows", [8, 6])
def test_kernel_is_gathered_and_its_gradient_scattered(axes, rows):
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    arrays = rng.standard_normal((rows, 2, 8), np.float32), rng.standard_normal((8, 8), np.float32)
    x, kernel = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))

    def loss(kernel, x):
        product = sharded_matmul(x, kernel, axes)
        return (product**2).sum(), product

    with sharding.use_mesh(mesh):
        gradient = jax.grad(loss, has_aux=True)
        program = str(jax.make_jaxpr(gradient)(kernel, x))
        actual, product = jax.jit(gradient)(kernel, x)
    is_divided = rows % 4 == 0
    assert ("all_gather" in program, "reduce_scatter" in program) == (is_divided, is_divided)
    np.testing.assert_allclose(product, x @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual, 2 * np.einsum("btk,btn->kn", x, x @ kernel), rtol=1e-4, atol=1e-4)
