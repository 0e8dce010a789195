"""IBQ against its published formulation over the whole N × K matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tokenizer.quantizers.arrays import normal, value_and_pullback
from tokenizer.quantizers.ibq import IBQ


def reference(codebook, latents):
    """One-hot codes with the gradient of the softmax (arXiv 2412.02692, eq. 4 to 6 and 8)."""
    logits = latents @ codebook.T
    soft, constant = jax.nn.softmax(logits), jax.lax.stop_gradient
    hard = jax.nn.one_hot(logits.argmax(-1), len(codebook))
    vectors = (hard - constant(soft) + soft) @ codebook
    rows = hard @ codebook
    p = jax.nn.softmax(logits / 0.5)
    mean = p.mean(0)
    entropy = -(p * jnp.log(p)).sum(-1).mean() + (mean * jnp.log(mean)).sum()
    losses = [jnp.square(vectors - latents), jnp.square(constant(rows) - latents), jnp.square(rows - constant(latents))]
    return vectors, jnp.array([*[x.mean() for x in losses], entropy])


def test_ibq_equals_published_formulation():
    codebook, latents, to_vectors = normal(32, 4), normal(6, 4, seed=1), normal(6, 4, seed=2)

    def actual(codebook, latents):
        quantized = IBQ(temperature=0.5).quantize({"codebook": codebook}, latents)
        assert [*quantized.losses] == ["quantization", "commitment", "codebook", "entropy"]
        return quantized.vectors, jnp.array([*quantized.losses.values()])

    cotangents = (to_vectors, jnp.array([1.0, 2.0, 3.0, 4.0]))
    results = [value_and_pullback(f, (codebook, latents), cotangents) for f in (actual, reference)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)
    _, (to_codebook, _) = results[0]
    assert (np.abs(to_codebook).sum(-1) > 0).all()  # every row
