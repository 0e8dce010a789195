"""The three networks against torch: diffusers' `VQModel` is the released one; the other two are written out here.

Random weights at reduced widths: what is compared is the arithmetic and the layout of the parameters.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lvm import module
from tokenizer.vqgan import VARIANTS, VQGAN

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = {"resolution": 64, "channels": 32, "codebook_size": 128, "codebook_dim": 8, "norm_groups": 8}


def random_params(config):
    """Parameters of every kind away from their initial values, so that a swapped one shows."""
    params = module.init_params(lambda rngs: VQGAN(config, rngs), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p) + 0.05 * rng.standard_normal(p.shape, np.float32), params)


def in_jax(config, params, images):
    graphdef, _ = module.abstract(lambda rngs: VQGAN(config, rngs))

    @jax.jit
    def run(params, images):
        model = module.merge(graphdef, params)
        latents = model.encode_latents(images)
        codes = model.quantize(latents)
        return latents, codes, model.decode_float(codes)

    return [np.asarray(x) for x in run(params, images)]


def spread_codebook(config, params, images):
    """A codebook with the latents' mean and scale in each channel: else one code would be nearest to all."""
    latents, _, _ = in_jax(config, params, images)
    rng = np.random.default_rng(1)
    rows = latents.mean((0, 1, 2)) + latents.std((0, 1, 2)) * rng.standard_normal(params["codebook"].shape)
    return params | {"codebook": rows.astype(np.float32)}


def check_agreement(config, params, images, latents, decode):
    """Compare with torch's latents [B, C, h, w], and with its decoding of our codes: [B, N] → [B, 3, H, W]."""
    ours, codes, decoded = in_jax(config, params, images)
    latents = latents.numpy().transpose(0, 2, 3, 1)  # [B, h, w, C]
    np.testing.assert_allclose(ours, latents, atol=1e-4, rtol=0)

    rows = params["codebook"].astype(np.float64)
    distances = np.square(latents[..., None, :] - rows).sum(-1).reshape(*codes.shape, -1)  # [B, N, K]
    nearest_two = np.sort(distances, axis=-1)[..., :2]
    clear = nearest_two[..., 1] - nearest_two[..., 0] > 1e-3
    assert clear.mean() > 0.9
    assert len(np.unique(codes)) > 5
    np.testing.assert_array_equal(codes[clear], distances.argmin(-1)[clear])

    reference = decode(torch.from_numpy(codes.copy()).long()).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(decoded, reference, atol=1e-4, rtol=0)
    assert decoded.std() > 0.05


def images(count=3):
    return np.random.default_rng(2).random((count, 64, 64, 3), np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


# --- "lvm" against diffusers ---------------------------------------------------------------------------------


def to_diffusers(params):
    """Our tree under diffusers' names."""
    state = {"quantize.embedding.weight": params["codebook"]}

    def conv(ours, name):
        state[f"{name}.weight"] = ours["kernel"].transpose(3, 2, 0, 1)
        state[f"{name}.bias"] = ours["bias"]

    def norm(ours, name):
        state[f"{name}.weight"], state[f"{name}.bias"] = ours["scale"], ours["bias"]

    def blocks(ours, name):
        for j, block in ours.get("blocks", {}).items():
            for part in ("norm1", "norm2"):
                norm(block[part], f"{name}.resnets.{j}.{part}")
            for part, theirs in (("conv1", "conv1"), ("conv2", "conv2"), ("shortcut", "conv_shortcut")):
                if part in block:
                    conv(block[part], f"{name}.resnets.{j}.{theirs}")

    for half, stage_name, resample in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        ours = params[half]
        for part in ("conv_in", "conv_out"):
            conv(ours[part], f"{half}.{part}")
        norm(ours["norm_out"], f"{half}.conv_norm_out")
        blocks(ours["middle"], f"{half}.mid_block")
        for i, stage in ours["stages"].items():
            blocks(stage, f"{half}.{stage_name}.{i}")
            if "resample" in stage:
                conv(stage["resample"]["conv"], f"{half}.{stage_name}.{i}.{resample}.0.conv")
    for part in ("quant_conv", "post_quant_conv"):
        conv(params[part], part)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def test_lvm_agrees_with_diffusers():
    config = dataclasses.replace(VARIANTS["lvm"], **SMALL)
    params = spread_codebook(config, random_params(config), images())
    theirs = diffusers.VQModel(
        block_out_channels=config.widths,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=2,
        latent_channels=config.codebook_dim,
        num_vq_embeddings=config.codebook_size,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    ).eval()
    theirs.load_state_dict(to_diffusers(params), strict=True)
    with torch.no_grad():
        latents = theirs.encode(nchw(images())).latents
        shape = (len(images()), *config.grid, config.codebook_dim)
        decode = lambda codes: theirs.decode(codes, force_not_quantize=True, shape=shape).sample  # noqa: E731
        check_agreement(config, params, images(), latents, decode)


# --- "maskgit" and "lvm_old" against the description, in torch ------------------------------------------------


def conv2d(x, ours):
    kernel = torch.from_numpy(np.ascontiguousarray(ours["kernel"].transpose(3, 2, 0, 1)))
    bias = torch.from_numpy(ours["bias"]) if "bias" in ours else None
    return torch.nn.functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)


def norm_swish(x, ours, groups):
    scale, bias = torch.from_numpy(ours["scale"]), torch.from_numpy(ours["bias"])
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, scale, bias, eps=1e-6))


def run_blocks(x, ours, variant):
    for j in range(len(ours.get("blocks", {}))):
        block = ours["blocks"][str(j)]
        h = conv2d(norm_swish(x, block["norm1"], 8), block["conv1"])
        h = conv2d(norm_swish(h, block["norm2"], 8), block["conv2"])
        assert "bias" not in block["conv1"]
        assert ("shortcut" in block) == (x.shape[1] != h.shape[1])
        if "shortcut" in block:
            x = conv2d(h if variant == "maskgit" else x, block["shortcut"])
        x = h + x
    return x


def encode_in_torch(x, params, variant):
    ours = params["encoder"]
    x = conv2d(x, ours["conv_in"])
    for i in range(5):
        x = run_blocks(x, ours["stages"][str(i)], variant)
        if i < 4:
            x = torch.nn.functional.avg_pool2d(x, 2)
    x = run_blocks(x, ours["middle"], variant)
    return conv2d(norm_swish(x, ours["norm_out"], 8), ours["conv_out"])


def decode_in_torch(codes, params, variant):
    ours = params["decoder"]
    rows = params["codebook"][codes.numpy()]  # [B, N, C]
    side = int(codes.shape[1] ** 0.5)
    x = nchw(rows.reshape(len(rows), side, side, -1))
    x = run_blocks(conv2d(x, ours["conv_in"]), ours["middle"], variant)
    for i in range(5):
        stage = ours["stages"][str(i)]
        x = run_blocks(x, stage, variant)
        if i < 4 and variant == "maskgit":
            x = conv2d(
                torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"), stage["resample"]["conv"]
            )
        elif i < 4:
            x = conv2d(x, stage["resample"]["conv"])
            B, depth, H, W = x.shape  # depth ordered (h2 w2 c)
            x = x.reshape(B, 2, 2, depth // 4, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, -1, 2 * H, 2 * W)
    return conv2d(norm_swish(x, ours["norm_out"], 8), ours["conv_out"])


@pytest.mark.parametrize("variant", ["maskgit", "lvm_old"])
def test_the_older_networks_agree_with_their_description(variant):
    config = dataclasses.replace(VARIANTS[variant], **SMALL)
    params = spread_codebook(config, random_params(config), images())
    assert "quant_conv" not in params
    with torch.no_grad():
        latents = encode_in_torch(nchw(images()), params, variant)
        check_agreement(
            config,
            params,
            images(),
            latents,
            functools.partial(decode_in_torch, params=params, variant=variant),
        )
