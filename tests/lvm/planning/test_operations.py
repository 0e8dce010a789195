"""FLOPs of programs by hand."""

import jax
import jax.numpy as jnp
import pytest

from lvm.planning.operations import count_flops

SHAPE = jax.ShapeDtypeStruct


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_count_flops_of_products_and_loops():
    matrix, x = SHAPE((5, 7), jnp.float32), SHAPE((3, 5), jnp.float32)
    assert count_flops(jnp.matmul, x, matrix) == 2 * 3 * 5 * 7
    scanned = lambda x, w: jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=4)[0]  # noqa: E731
    assert count_flops(jax.jit(scanned), SHAPE((3, 5), jnp.float32), SHAPE((5, 5), jnp.float32)) == 4 * 2 * 3 * 5 * 5
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x)  # noqa: E731
    assert count_flops(branches, SHAPE((4, 4), jnp.float32)) == 2 * 2 * 4**3


def test_count_flops_refuses_products_in_while():
    def products(x, count):
        return jax.lax.while_loop(lambda carry: carry[1] > 0, lambda carry: (carry[0] @ x, carry[1] - 1), (x, count))

    with pytest.raises(ValueError, match="products in a while loop"):
        count_flops(products, SHAPE((4, 4), jnp.float32), SHAPE((), jnp.int32))


@pytest.mark.parametrize("stride", [1, 2])
def test_count_flops_of_convolution_and_gradient(stride):
    x, kernel = SHAPE((2, 8, 8, 3), jnp.float32), SHAPE((3, 3, 3, 5), jnp.float32)
    forward = 2 * 2 * (8 // stride) ** 2 * 5 * 3 * 3 * 3
    assert count_flops(lambda x, k: conv(x, k, stride), x, kernel) == forward
    loss = jax.grad(lambda x, k: jnp.sum(conv(x, k, stride) ** 2), (0, 1))
    assert count_flops(loss, x, kernel) == pytest.approx(3 * forward, rel=0.3)  # padding of the gradients counts
