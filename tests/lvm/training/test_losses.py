"""Chunked cross-entropy against NumPy, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax, logsumexp

from lvm.hardware import sharding
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training.losses import token_losses

B, T, D, V = 4, 12, 8, 32


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    return hidden, jnp.asarray(rng.normal(0, 3, (D, V)), jnp.float32), jnp.asarray(rng.integers(0, V, (B, T)))


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 100])
def test_token_losses_are_negative_log_softmax(chunk):
    hidden, projection, targets = arrays()
    losses, log_z = jax.jit(token_losses, static_argnums=3)(hidden, projection, targets, chunk)
    logits = np.asarray(hidden, np.float64) @ np.asarray(projection, np.float64)
    expected = -np.take_along_axis(log_softmax(logits, -1), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_z, logsumexp(logits, axis=-1), rtol=1e-5)


def test_uniform_logits_cost_log_vocabulary():
    losses, _ = token_losses(jnp.zeros((1, 2, D)), jnp.zeros((D, 20)), jnp.zeros((1, 2), int), 2)
    np.testing.assert_allclose(losses, np.log(20), rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [MeshConfig(), MeshConfig(fsdp=4, tensor=2, data=1), MeshConfig(fsdp=2, sequence=2, tensor=2)],
)
def test_mesh_changes_neither_losses_nor_gradients(config):
    mesh = make_mesh(config) if config != MeshConfig() else make_mesh(config, jax.devices()[:4])

    def total(hidden, projection, targets, mesh):
        with sharding.use_mesh(mesh):
            losses, log_z = token_losses(hidden, projection, targets, 4)
            return jnp.sum(losses * jnp.arange(T)) + jnp.sum(log_z**2)

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=3)
    placed = jax.device_put(arrays(), NamedSharding(mesh, PartitionSpec()))
    single, meshed = run(*arrays(), None), run(*placed, mesh)
    for expected, actual in zip(jax.tree.leaves(single), jax.tree.leaves(meshed), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_chunk_gradients_accumulate_in_float32():
    # Many equal contributions: summed in bfloat16 they would stop growing at 256 times the first.
    hidden = jnp.ones((1, 1024, D), jnp.bfloat16)
    targets = jnp.zeros((1, 1024), jnp.int32)
    loss = lambda projection: jnp.sum(token_losses(hidden, projection, targets, 1)[0])  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(jnp.zeros((D, V), jnp.float32))
    np.testing.assert_allclose(gradient[:, 1], 1024 / V, rtol=1e-2)


def test_only_one_chunk_of_logits_is_in_memory():
    hidden = jax.ShapeDtypeStruct((1, 4096, 16), jnp.float32)
    projection = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    loss = lambda *arrays: jnp.sum(token_losses(*arrays, 128)[0])  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, projection, targets).compile()
    chunk = 128 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * chunk  # all logits are 32 chunks
