"""Tokenizer training task: phases, codebook seeding, losses, determinism."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from skimage.metrics import peak_signal_noise_ratio

from lvm.common.errors import UserError
from lvm.evaluation.metrics import ssim
from tokenizer.losses import pixels
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig, TokenizerTask, to_float, to_uint8
from tokenizer.quantizers.vq import L2VQ

CONFIG = VQGANConfig(
    resolution=16, patch_size=4, channels=8, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=0, codebook_size=16, codebook_dim=4, norm_groups=4, quant_convs=False, quantizer=L2VQ(),
)  # fmt: skip
SEED_STEP = 4


@functools.cache
def make_task():
    schedule = optax.constant_schedule(1e-2)
    loss = LossConfig(autoencoder_steps=SEED_STEP)
    return TokenizerTask(CONFIG, loss, optax.adam(schedule), schedule, batch_size=8)


@functools.cache
def compiled():
    return jax.jit(make_task().update, donate_argnums=0)  # as the loop does


def batch(seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    return {"images": jnp.asarray(images.repeat(4, 1).repeat(4, 2))}  # flat patches: easy to learn


def run(steps):
    # A copy: outside of jit, parts of an initial state share buffers, which can't be donated twice.
    state, history = jax.tree.map(jnp.copy, make_task().init(jax.random.key(0))), []
    for step in range(steps):
        state, metrics = compiled()(state, batch(), jax.random.fold_in(jax.random.key(1), step))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def test_init_and_update_have_documented_shapes():
    assert make_task().batch_spec == {"images": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8)}
    state = jax.eval_shape(make_task().init, jax.random.key(0))
    assert set(state) == {"step", "params", "training"}
    after, metrics = jax.eval_shape(make_task().update, state, make_task().batch_spec, jax.random.key(0))
    matches = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(matches))
    assert {value.shape for value in metrics.values()} == {()}
    assert {str(value.dtype) for value in metrics.values()} == {"float32", "int32"}  # int32: skip counts
    assert {"loss", "grad_norm", "learning_rate", "psnr", "codebook_usage", "codebook_perplexity"} <= set(metrics)


def test_loss_falls_in_both_phases():
    _, history = run(40)
    assert history[SEED_STEP - 1]["loss"] < history[0]["loss"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["psnr"] > history[SEED_STEP]["psnr"]
    assert all(entry["loss/commitment"] == 0 for entry in history[:SEED_STEP])
    weights = {"l1": 1.0, "l2": 4.0, "gradient": 0.5, "commitment": 0.25}
    for entry in (history[0], history[-1]):
        total = sum(weight * entry[f"loss/{name}"] for name, weight in weights.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("resolution", "has_ssim"), [(16, True), (8, False)])
def test_evaluate_compares_heldout_images_as_scikit_image_does(resolution, has_ssim):
    config, schedule = dataclasses.replace(CONFIG, resolution=resolution), optax.constant_schedule(1e-2)
    images = np.random.default_rng(0).integers(0, 256, (3, resolution, resolution, 3), np.uint8)
    task = TokenizerTask(config, LossConfig(), optax.sgd(1.0), schedule, batch_size=8, heldout={"rgb": images})
    state = task.init(jax.random.key(0))
    metrics = task.evaluate(state)
    decoded = np.asarray(task.reconstruct(state["params"], jnp.asarray(images)))
    expected = {
        "heldout_psnr/rgb": np.mean([peak_signal_noise_ratio(*pair) for pair in zip(images, decoded, strict=True)])
    }
    if has_ssim:
        expected["heldout_ssim/rgb"] = ssim(decoded, images).mean()
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_codebook_moves_without_gradient_once_seeded():
    start, _ = run(0)
    before, _ = run(SEED_STEP)
    np.testing.assert_array_equal(start["params"]["codebook"], before["params"]["codebook"])
    np.testing.assert_array_equal(before["training"]["quantizer"]["counts"], 1.0)
    after, history = run(SEED_STEP + 1)
    assert history[-2]["codebook_usage"] == 0
    assert history[-1]["codebook_usage"] > 0.9  # each code is nearest to the latent that seeded it
    assert np.abs(after["params"]["codebook"] - before["params"]["codebook"]).max() > 0.1
    moments = jax.tree.leaves_with_path(after["training"]["optimizer"])
    assert moments
    assert not any("codebook" in jax.tree_util.keystr(path) for path, _ in moments)


def test_codebook_keeps_unit_length():
    state, _ = run(SEED_STEP + 3)
    np.testing.assert_allclose(jnp.linalg.norm(state["params"]["codebook"], axis=-1), 1.0, atol=1e-6)


def test_codebook_changes_no_loss_before_it_is_seeded():
    state, _ = run(0)
    other = jax.tree.map(jnp.copy, state)
    other["params"]["codebook"] *= -1
    metrics, others = (compiled()(x, batch(), jax.random.key(0))[1] for x in (state, other))
    assert metrics["loss"] == others["loss"]
    assert metrics["quantization_error"] != others["quantization_error"]  # of the unused codes


@functools.cache
def gradients():
    """Compiled gradients of two losses at a step, and the forward pass, with a codebook that is seeded at step -1."""
    task = TokenizerTask(
        CONFIG, LossConfig(), make_task().optimizer, make_task().schedule, batch_size=8, has_codebook=True
    )

    def terms(params, step):
        images = to_float(batch()["images"])
        (decoded, commitment), forward = task._forward(params, images, step, jax.random.key(0))
        return {"l2": pixels.l2(decoded, images), "commitment": commitment}, forward

    return jax.jit(jax.jacrev(terms, has_aux=True))


def test_encoder_gets_gradients_through_codes_and_of_commitment():
    jacobian, _ = gradients()(run(0)[0]["params"], jnp.int32(0))
    largest = jax.tree.map(lambda x: float(np.abs(x).max()), jacobian)
    for values in largest.values():
        assert min(jax.tree.leaves(values["encoder"])) > 0
        assert values["codebook"] == 0
    assert min(jax.tree.leaves(largest["l2"]["decoder"])) > 0
    assert max(jax.tree.leaves(largest["commitment"]["decoder"])) == 0


def test_codebook_is_seeded_from_encoder_outputs():
    params = run(0)[0]["params"]
    latents = np.asarray(make_task().model(params).encode_latents(to_float(batch()["images"]))).reshape(-1, 4)
    for step, is_seeded in ((-1, True), (0, False)):
        _, forward = gradients()(params, jnp.int32(step))
        nearest = np.abs(np.asarray(forward.quantizer["codebook"])[:, None] - latents).max(-1).min(-1)  # [K]
        assert (nearest.max() < 1e-4) == is_seeded
    assert len(np.unique(np.asarray(gradients()(params, jnp.int32(-1))[1].quantizer["codebook"]), axis=0)) == 16


def test_update_is_deterministic():
    (first, _), (second, _) = run(SEED_STEP + 3), run(SEED_STEP + 3)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_reconstruct_encodes_to_codes_and_clips(monkeypatch):
    class Rounding:
        """Codes are the pixels in fifths of the range; each is decoded as twice its value, which may exceed white."""

        def encode(self, images):
            return jnp.round(images * 5).astype(jnp.int32)

        def decode_float(self, codes):
            return codes / 5 * 2

    monkeypatch.setattr(TokenizerTask, "model", lambda self, params: Rounding())
    images = jnp.full((1, 16, 16, 3), 50, jnp.uint8).at[0, 0, 0].set(jnp.array([0, 110, 255], jnp.uint8))
    reconstructed = make_task().reconstruct({}, images)
    assert reconstructed.dtype == jnp.uint8
    assert reconstructed[0, 0, 0].tolist() == [0, 204, 255]
    assert reconstructed[0, 1, 0].tolist() == [102, 102, 102]


def test_losses_match_values_by_hand():
    a, b = jnp.zeros((2, 2, 2, 1)), jnp.array([1.0, 0.0, 0.0, 0.0] * 2).reshape(2, 2, 2, 1)
    assert pixels.l1(a, b) == 0.25
    assert pixels.l2(a, b / 2) == 0.0625
    assert pixels.gradient_l1(a, b) == 0.5 + 0.5


def test_to_uint8_inverts_to_float():
    every = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(every)), every)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": -1.0}, "l1=-1.0"),
        ({"autoencoder_steps": -1}, "autoencoder_steps=-1"),
    ],
)
def test_loss_config_rejects_impossible_values(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        LossConfig(**changes)
