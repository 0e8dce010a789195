"""Plain and normalized vector quantization: moving averages, gradients, dead codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common.errors import UserError
from tests.tokenizer.quantizers.arrays import normal
from tokenizer.quantizers.nearest import normalize
from tokenizer.quantizers.vq import L2VQ, VQ, sample_latents


def test_update_follows_moving_averages_by_hand():
    codebook, latents = normal(4, 2), normal(6, 2, seed=1)
    codes = np.array([0, 0, 2, 3, 3, 3])
    state = {"counts": jnp.array([1.0, 2.0, 3.0, 4.0]), "sums": codebook}
    quantizer = VQ(ema_decay=0.9, dead_below=0.0)
    params, state = quantizer.update({"codebook": codebook}, state, latents, jnp.asarray(codes), jax.random.key(0))
    counts = 0.9 * np.array([1, 2, 3, 4]) + 0.1 * np.array([2, 0, 1, 3])
    batch_sums = np.stack([latents[:2].sum(0), np.zeros(2), latents[2], latents[3:].sum(0)])
    sums = 0.9 * codebook + 0.1 * batch_sums
    np.testing.assert_allclose(state["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(state["sums"], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["codebook"], sums / counts[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_update_resets_dead_codes_to_latents(learning):
    codebook, latents = normal(8, 2), normal(32, 2, seed=1)
    quantizer = VQ(learning=learning, ema_decay=0.9)
    state = quantizer.init_state({"codebook": codebook}) | {"counts": jnp.array([1.0] * 6 + [0.01] * 2)}
    codes = jnp.zeros(32, jnp.int32)
    params, state = quantizer.update({"codebook": codebook}, state, latents, codes, jax.random.key(0))
    rows = {tuple(row) for row in np.asarray(latents).tolist()}
    assert [tuple(row) in rows for row in np.asarray(params["codebook"]).tolist()] == [False] * 6 + [True] * 2
    np.testing.assert_array_equal(state["counts"][6:], 1.0)
    if learning == "gradient":
        np.testing.assert_array_equal(params["codebook"][:6], codebook[:6])


@pytest.mark.parametrize("quantizer", [VQ(learning="gradient"), L2VQ(learning="gradient")])
def test_losses_and_their_gradients_by_hand(quantizer):
    params, latents = {"codebook": normal(8, 3)}, quantizer.prepare(normal(5, 3, seed=1))

    def losses(params, latents):
        return quantizer.quantize(params, latents).losses

    quantized = jax.jit(quantizer.quantize)(params, latents)
    difference = np.asarray(latents) - np.asarray(quantizer.rows(params))[np.asarray(quantized.codes)]
    expected = np.mean(np.square(difference))
    np.testing.assert_allclose([*quantized.losses.values()], expected, rtol=1e-5)
    gradients = jax.jit(jax.jacrev(losses, argnums=(0, 1)))(params, latents)
    to_params, to_latents = gradients["commitment"]
    np.testing.assert_array_equal(to_params["codebook"], 0.0)
    np.testing.assert_allclose(to_latents, 2 * difference / 15, rtol=1e-5)
    to_params, to_latents = gradients["codebook"]
    np.testing.assert_array_equal(to_latents, 0.0)
    used = np.unique(quantized.codes)
    is_moved = np.abs(np.asarray(to_params["codebook"])).sum(-1) > 0
    np.testing.assert_array_equal(is_moved, np.isin(np.arange(8), used))


def test_l2_compares_unit_vectors():
    quantizer, latents = L2VQ(), 5 * normal(32, 3)
    prepared = quantizer.prepare(latents)
    np.testing.assert_allclose(jnp.linalg.norm(prepared, axis=-1), 1.0, atol=1e-6)
    params = {"codebook": jnp.linspace(0.5, 2.0, 8)[:, None] * normalize(normal(8, 3, seed=1))}  # of unequal lengths
    cosines = np.asarray(prepared) @ np.asarray(normalize(params["codebook"])).T
    np.testing.assert_array_equal(quantizer.quantize(params, prepared).codes, cosines.argmax(-1))


def test_l2_moving_averages_keep_unit_length():
    quantizer, latents = L2VQ(ema_decay=0.5), normalize(normal(32, 3))
    params = quantizer.seed({"codebook": jnp.zeros((8, 3))}, latents, jax.random.key(0))
    codes = quantizer.quantize(params, latents).codes
    params, _ = quantizer.update(params, quantizer.init_state(params), latents, codes, jax.random.key(1))
    np.testing.assert_allclose(jnp.linalg.norm(params["codebook"], axis=-1), 1.0, atol=1e-6)


def test_sample_latents_repeats_only_when_too_few():
    latents = jnp.arange(6.0)[:, None]
    assert len(np.unique(sample_latents(latents, 6, jax.random.key(0)))) == 6
    assert sample_latents(latents, 15, jax.random.key(0)).shape == (15, 1)
    assert len(np.unique(sample_latents(latents, 15, jax.random.key(0)))) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning": "kmeans"}, "learning='kmeans'"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
        ({"dead_below": -1.0}, "dead_below=-1.0"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"gradient": "none"}, "gradient='none'"),
        ({"codebook": 2.0}, "codebook=2.0 has no effect with learning='ema'"),
        ({"temperature": 1.0}, "temperature=1.0 has no effect with entropy=0"),
    ],
)
def test_config_rejects_impossible_values(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(VQ(), **changes)
