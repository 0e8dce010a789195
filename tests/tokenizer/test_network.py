"""The VQGAN network: published sizes, every setting, batch independence, and config checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.model import nnx_utils
from tokenizer.network import VARIANTS, VQGAN, VQGANConfig, depth_to_space
from tokenizer.quantizers.nearest import normalize
from tokenizer.quantizers.vq import L2VQ

TINY = VQGANConfig(
    resolution=16, patch_size=2, channels=8, channel_multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=1, codebook_size=64, codebook_dim=4, norm_groups=4,
)  # fmt: skip


def build(config):
    graphdef, params = nnx_utils.abstract_module(lambda rngs: VQGAN(config, rngs))
    rng = np.random.default_rng(0)  # numpy does not compile

    def fill(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return jnp.full(leaf.shape, float(path[-1].key == "scale"), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-1]
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return nnx_utils.merge(graphdef, jax.tree.map_with_path(fill, params))


def images(count, side=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((count, side, side, 3), np.float32))


@pytest.mark.parametrize(("variant", "count"), [("maskgit", 54_515_587), ("lvm_old", 64_349_219), ("lvm", 146_244_675)])
def test_variants_have_published_parameter_counts(variant, count):
    _, params = nnx_utils.abstract_module(lambda rngs: VQGAN(VARIANTS[variant], rngs))
    assert nnx_utils.count_params(params) == count


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_encode_to_256_codes(variant):
    config = VARIANTS[variant]
    graphdef, params = nnx_utils.abstract_module(lambda rngs: VQGAN(config, rngs))
    pixels = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    codes = jax.eval_shape(lambda p, x: nnx_utils.merge(graphdef, p).encode(x), params, pixels)
    assert (codes.shape, codes.dtype) == ((2, 256), jnp.int32)
    decoded = jax.eval_shape(lambda p, c: nnx_utils.merge(graphdef, p).decode_float(c), params, codes)
    assert (decoded.shape, decoded.dtype) == ((2, 256, 256, 3), jnp.float32)
    assert (config.grid, config.codes_per_image) == ((16, 16), 256)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 1},
        {"downsample": "average", "upsample": "depth_to_space", "shortcut": "output"},
        {"latent_kernel": 1, "quant_convs": False, "block_bias": False, "middle_blocks": 0},
        {"compute_dtype": "bfloat16", "quantizer": L2VQ()},
    ],
)
def test_encode_and_decode_with_every_setting(changes):
    config = dataclasses.replace(TINY, **changes)
    graphdef, params = nnx_utils.split(build(config))

    @jax.jit
    def run(params, pixels):
        model = nnx_utils.merge(graphdef, params)
        latents, codes = model.encode_latents(pixels), model.encode(pixels)
        rows = model.codebook[...]
        rows = normalize(rows) if config.quantizer == L2VQ() else rows
        quantized = rows[codes].reshape(latents.shape)
        return latents, codes, model.decode_float(codes), model.decode_latents(quantized)

    latents, codes, decoded, from_rows = run(params, images(3))
    assert (latents.shape, latents.dtype) == ((3, *config.grid, 4), jnp.float32)
    assert (codes.shape, codes.dtype) == ((3, config.codes_per_image), jnp.int32)
    assert (decoded.shape, decoded.dtype) == ((3, 16, 16, 3), jnp.float32)
    np.testing.assert_array_equal(decoded, from_rows)
    if config.quantizer == L2VQ():
        np.testing.assert_allclose(jnp.linalg.norm(latents, axis=-1), 1.0, atol=1e-5)


def test_bfloat16_keeps_float32_parameters():
    _, params = nnx_utils.split(build(dataclasses.replace(TINY, compute_dtype="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_codes_are_independent_of_the_batch():
    graphdef, params = nnx_utils.split(build(TINY))
    encode = jax.jit(lambda p, x: nnx_utils.merge(graphdef, p).encode(x))
    seven = images(7)
    together = encode(params, seven)
    alone = jnp.concatenate([encode(params, seven[i : i + 1]) for i in range(7)])
    padded = encode(params, jnp.concatenate([seven, jnp.zeros((9, 16, 16, 3))]))[:7]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, padded)
    assert len(np.unique(together)) > 10


def test_codes_are_in_raster_order():
    model = build(TINY)
    latents = model.codebook[...][jnp.arange(16)].reshape(1, 4, 4, 4)
    np.testing.assert_array_equal(model.quantize(latents), jnp.arange(16)[None])


def test_depth_to_space_orders_row_column_channel():
    x = jnp.arange(8).reshape(1, 1, 1, 8)
    np.testing.assert_array_equal(depth_to_space(x, 2)[0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


def test_parameter_paths_are_stable():
    _, params = nnx_utils.split(build(TINY))
    assert set(params) == {"encoder", "decoder", "quant_conv", "post_quant_conv", "codebook"}
    assert params["encoder"]["stages"]["1"]["blocks"]["0"]["shortcut"]["kernel"].shape == (1, 1, 8, 16)
    assert params["decoder"]["stages"]["0"]["resample"]["conv"]["kernel"].shape == (3, 3, 16, 16)
    assert params["encoder"]["middle"]["blocks"]["0"]["norm1"]["scale"].shape == (16,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortcut": "none"}, "shortcut='none'"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
        ({"latent_kernel": 2}, "latent_kernel=2"),
        ({"resolution": 18}, "resolution=18 must be a multiple of 4"),
        ({"norm_groups": 3}, "norm_groups=3"),
        ({"channel_multipliers": ()}, "channel_multipliers=()"),
        ({"codebook_size": 65537}, "codebook_size=65537"),
        ({"codebook_dim": 0}, "codebook_dim=0"),
        ({"middle_blocks": -1}, "middle_blocks=-1"),
    ],
)
def test_config_names_impossible_values(changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(TINY, **changes)
    assert message in str(caught.value)
