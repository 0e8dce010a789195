"""SimVQ: a frozen codebook behind a learned map."""

import jax
import numpy as np

from tests.tokenizer.quantizers.arrays import normal
from tokenizer.quantizers.simvq import SimVQ


def test_simvq_moves_every_row_by_its_projection():
    quantizer = SimVQ()
    params = quantizer.init(64, 4, jax.random.key(0)) | {"projection": normal(4, 4, seed=3)}
    latents = normal(5, 4, seed=1)
    codes = quantizer.quantize(params, latents).codes
    rows = np.float64(params["codebook"]) @ np.float64(params["projection"])
    distances = np.square(np.float64(latents)[:, None] - rows).sum(-1)
    np.testing.assert_array_equal(codes, distances.argmin(-1))
    np.testing.assert_allclose(quantizer.lookup(params, codes), rows[codes], rtol=1e-5, atol=1e-6)
    # d/dW mean (C W − z)² = 2 Cᵀ(C W − z) / count, over the selected rows C.
    gradient = jax.grad(lambda params: quantizer.quantize(params, latents).losses["codebook"])(params)["projection"]
    selected = np.float64(params["codebook"])[codes]
    np.testing.assert_allclose(gradient, 2 * selected.T @ (rows[codes] - latents) / 20, rtol=1e-4, atol=1e-6)


def test_simvq_starts_with_rows_of_unit_length():
    rows = SimVQ().rows(SimVQ().init(1024, 64, jax.random.key(0)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1).mean(), 1.0, atol=0.05)
