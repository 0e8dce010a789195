"""The network against numpy in float64, written from the papers: padding, group norms, shortcuts and resampling."""

import dataclasses

import jax
import numpy as np
import pytest

from lvm.model import nnx_utils
from tests.tokenizer.networks import random_weights
from tokenizer.network import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    resolution=16, patch_size=2, channels=8, channel_multipliers=(1, 2), encoder_blocks=2, decoder_blocks=1,
    middle_blocks=1, codebook_size=64, codebook_dim=4, norm_groups=4,
)  # fmt: skip
MASKGIT = {"downsample": "average", "upsample": "depth_to_space", "shortcut": "output", "latent_kernel": 1}


def conv(x, p, stride=1, padding=None):
    """A convolution of [H, W, C]; by default padded alike on both sides, and not at all where stride = kernel."""
    kernel = p["kernel"].astype(np.float64)
    side = 0 if stride == len(kernel) else len(kernel) // 2
    before, after = padding or (side, side)
    x = np.pad(x, ((before, after), (before, after), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijco->hwo", windows, kernel) + p.get("bias", 0.0)


def norm_swish(x, p, groups):
    """Group norm of contiguous channels with epsilon 1e-6, then swish."""
    grouped = x.reshape(-1, groups, x.shape[-1] // groups)
    mean, variance = grouped.mean(axis=(0, 2), keepdims=True), grouped.var(axis=(0, 2), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]
    return y / (1 + np.exp(-y))


def depth_to_space(x, factor):
    """Depth ordered (row, column, channel) to pixels."""
    H, W, depth = x.shape
    out = np.zeros((H * factor, W * factor, depth // factor**2))
    for i, part in enumerate(np.split(x, factor**2, axis=-1)):
        out[i // factor :: factor, i % factor :: factor] = part
    return out


def block(x, p, config):
    h = conv(norm_swish(x, p["norm1"], config.norm_groups), p["conv1"])
    h = conv(norm_swish(h, p["norm2"], config.norm_groups), p["conv2"])
    return h + (conv(x if config.shortcut == "input" else h, p["shortcut"]) if "shortcut" in p else x)


def stage(x, p, config, resample=None):
    for i in range(len(p["blocks"])):
        x = block(x, p["blocks"][str(i)], config)
    return x if resample is None else resample(x, p.get("resample"))


def encode(image, params, config):
    """Latents [h, w, C] of an image."""

    def downsample(x, p):
        if config.downsample == "average":
            return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).mean(axis=(1, 3))
        return conv(x, p["conv"], stride=2, padding=(0, 1))

    p = params["encoder"]
    x = conv(image.astype(np.float64), p["conv_in"], stride=config.patch_size)
    x = stage(stage(x, p["stages"]["0"], config, downsample), p["stages"]["1"], config)
    x = conv(norm_swish(stage(x, p["middle"], config), p["norm_out"], config.norm_groups), p["conv_out"])
    return conv(x, params["quant_conv"]) if config.quant_convs else x


def decode(codes, params, config):
    """The image [H, W, 3] of codes."""

    def upsample(x, p):
        if config.upsample == "depth_to_space":
            return depth_to_space(conv(x, p["conv"]), 2)
        return conv(x.repeat(2, axis=0).repeat(2, axis=1), p["conv"])

    p, x = params["decoder"], params["codebook"][codes].reshape(*config.grid, -1).astype(np.float64)
    x = stage(conv(conv(x, params["post_quant_conv"]) if config.quant_convs else x, p["conv_in"]), p["middle"], config)
    x = stage(stage(x, p["stages"]["0"], config, upsample), p["stages"]["1"], config)
    return depth_to_space(conv(norm_swish(x, p["norm_out"], config.norm_groups), p["conv_out"]), config.patch_size)


@pytest.mark.parametrize("changes", [{}, {**MASKGIT, "quant_convs": False, "block_bias": False, "patch_size": 1}])
def test_network_equals_numpy_in_float64(changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_weights(config).params
    # So small that the epsilon of the first norms counts.
    for part in ("encoder", "decoder"):
        params[part]["conv_in"] = jax.tree.map(lambda x: x * 1e-3, params[part]["conv_in"])
    rng = np.random.default_rng(0)
    image = rng.random((16, 16, 3), np.float32)
    codes = rng.integers(0, 64, config.codes_per_image)
    graphdef, _ = nnx_utils.abstract_module(lambda rngs: VQGAN(config, rngs))

    @jax.jit
    def run(params, images, codes):
        model = nnx_utils.merge(graphdef, params)
        return model.encode_latents(images), model.decode_float(codes)

    latents, images = run(params, image[None], codes[None])
    for actual, expected in ((latents[0], encode(image, params, config)), (images[0], decode(codes, params, config))):
        assert expected.std() > 0.1
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
