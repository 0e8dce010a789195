import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.attention import attend, choose_kernel
from lvm.errors import UserError


def plain(query, key, value):
    """Dense causal attention, written out."""
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), value)


@pytest.mark.parametrize("length", [1, 100, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_equal_dense_attention_forward_and_backward(length, kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, length, 4, 8))
    key, value = (jax.random.normal(k, (2, length, kv_heads, 8)) for k in keys[1:3])
    weight = jax.random.normal(keys[3], query.shape)

    def run(function):
        loss = lambda *args: jnp.sum(function(*args) * weight)  # noqa: E731
        return function(query, key, value), *jax.grad(loss, (0, 1, 2))(query, key, value)

    for ours, wanted in zip(run(lambda *args: attend(*args, "xla")), run(plain), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_the_kernel_is_chosen_by_platform_and_what_cannot_run_is_an_error():
    assert choose_kernel("auto", "cpu", "bfloat16") == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16") == "cudnn"
    assert choose_kernel("auto", "gpu", "float32") == "xla"
    with pytest.raises(UserError, match="cudnn needs a GPU, this is cpu"):
        choose_kernel("cudnn", "cpu", "bfloat16")
    with pytest.raises(UserError, match="cudnn computes in bfloat16, dtype is float32"):
        choose_kernel("cudnn", "gpu", "float32")
    with pytest.raises(UserError, match="'flash' is not one of"):
        choose_kernel("flash", "cpu", "float32")
