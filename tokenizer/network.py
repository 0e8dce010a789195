"""The image ↔ code network: convolutional encoder, codebook, decoder (VQGAN, arXiv 2012.09841).

The three published networks (`VARIANTS`) and smaller ones are settings of one class. Images are NHWC floats in [0, 1],
kernels HWIO. Parameters are float32 and convolutions run in `compute_dtype`; norm statistics and the quantizer's
distances are always float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.model.nnx_utils import Params
from tokenizer.convolution import Conv
from tokenizer.quantizers.base import Quantizer
from tokenizer.quantizers.vq import VQ

_OWN_PARAMS = ("encoder", "decoder", "quant_conv", "post_quant_conv")


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Settings of a network; the defaults are those of "lvm", the network released with LVM."""

    resolution: int = 256  # side in pixels
    patch_size: int = 1  # size and stride of the first convolution; 1 is a plain 3×3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)  # one per stage; each stage after the first halves the side
    encoder_blocks: int = 2  # residual blocks per stage
    decoder_blocks: int = 3
    middle_blocks: int = 2  # residual blocks at the lowest resolution, in both encoder and decoder
    codebook_size: int = 8192
    codebook_dim: int = 64
    norm_groups: int = 32
    block_bias: bool = True  # biases in the convolutions of residual blocks and in the encoder's first
    shortcut: str = "input"  # or "output": where channels change, a block returns h + W·h of its own output h
    downsample: str = "strided_conv"  # or "average": 2×2 mean
    upsample: str = "nearest_conv"  # or "depth_to_space": a 3×3 to 4C, then [h2 w2 c] to space
    latent_kernel: int = 3  # the encoder's last convolution: 1 or 3
    quant_convs: bool = True  # a 1×1 convolution before and one after the quantizer
    quantizer: Quantizer = dataclasses.field(default_factory=VQ)
    compute_dtype: str = "float32"  # or "bfloat16"

    def __post_init__(self) -> None:
        check_choice(self, "shortcut", ("input", "output"))
        check_choice(self, "downsample", ("average", "strided_conv"))
        check_choice(self, "upsample", ("nearest_conv", "depth_to_space"))
        check_choice(self, "latent_kernel", (1, 3))
        check_choice(self, "compute_dtype", ("float32", "bfloat16"))
        check_positive(self, "resolution", "patch_size", "channels", "encoder_blocks", "decoder_blocks",
                       "codebook_size", "codebook_dim", "norm_groups")  # fmt: skip
        check_non_negative(self, "middle_blocks")
        size = (self.codebook_size, self.codebook_dim)
        if (fixed := self.quantizer.fixed_size) and fixed != size:
            raise UserError(f"codebook_size, codebook_dim={size} must be {fixed}, which quantizer={self.quantizer} has")
        if self.codebook_size > 65536:
            raise UserError(f"codebook_size={self.codebook_size} must be at most 65536: codes are stored as uint16")
        if min(self.channel_multipliers, default=0) < 1:
            raise UserError(f"channel_multipliers={self.channel_multipliers} must be positive, one per stage")
        if self.resolution % self.downsampling:
            raise UserError(f"resolution={self.resolution} must be a multiple of {self.downsampling}, the downsampling")
        if any(width % self.norm_groups for width in self.widths):
            raise UserError(f"norm_groups={self.norm_groups} must divide the channels of every stage {self.widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the highest resolution to the lowest."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Side of a code's patch in pixels."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's codes."""
        side = self.resolution // self.downsampling
        return side, side

    @property
    def codes_per_image(self) -> int:
        return math.prod(self.grid)

    def describe(self) -> dict[str, Any]:
        """Everything that the meaning of codes depends on besides the parameters, as JSON.

        Networks with a plain codebook keep the form that they have in the stores of earlier releases.
        """
        fields = {name: value for name, value in to_json(self).items() if name not in ("compute_dtype", "quantizer")}
        kind = self.quantizer.kind
        if kind in ("vq", "l2_vq"):
            return fields | {"l2_normalize": kind == "l2_vq"}
        return fields | {"quantizer": self.quantizer.describe()}


_MASKGIT = VQGANConfig(
    channel_multipliers=(1, 1, 2, 2, 4), decoder_blocks=2, codebook_size=1024, codebook_dim=256,
    block_bias=False, shortcut="output", downsample="average", latent_kernel=1, quant_convs=False,
)  # fmt: skip

VARIANTS = {
    "maskgit": _MASKGIT,
    "lvm_old": dataclasses.replace(
        _MASKGIT, codebook_size=8192, codebook_dim=32, shortcut="input", upsample="depth_to_space"
    ),
    "lvm": VQGANConfig(),
}


class GroupNormSwish(nnx.Module):
    """Group normalization (float32 statistics, epsilon 1e-6), then swish, in the input's dtype."""

    def __init__(self, channels: int, config: VQGANConfig):
        self.scale = nnx.Param(jnp.ones(channels), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels), axes=(None,))
        self.groups = config.norm_groups

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        y = x.astype(jnp.float32).reshape(B, H * W, self.groups, C // self.groups)  # [B, HW, G, C/G]
        mean = y.mean((1, 3), keepdims=True)  # [B, 1, G, 1]
        variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(B, H, W, C)
        return jax.nn.swish(y * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm → swish → 3×3 → norm → swish → 3×3, plus a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VQGANConfig, rngs: nnx.Rngs):
        bias = config.block_bias
        self.norm1 = GroupNormSwish(inputs, config)
        self.conv1 = Conv(inputs, outputs, 3, config.compute_dtype, rngs, bias=bias)
        self.norm2 = GroupNormSwish(outputs, config)
        self.conv2 = Conv(outputs, outputs, 3, config.compute_dtype, rngs, bias=bias)
        self.shortcut_of_input = config.shortcut == "input"
        source = inputs if self.shortcut_of_input else outputs
        self.shortcut = Conv(source, outputs, 1, config.compute_dtype, rngs, bias=bias) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B H W outputs"]:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))  # [B, H, W, out]
        if self.shortcut is None:
            return h + x
        return h + self.shortcut(x if self.shortcut_of_input else h)


class Downsample(nnx.Module):
    """Halves height and width."""

    def __init__(self, channels: int, config: VQGANConfig, rngs: nnx.Rngs):
        learned = config.downsample == "strided_conv"
        padding = ((0, 1), (0, 1))
        self.conv = (
            Conv(channels, channels, 3, config.compute_dtype, rngs, stride=2, padding=padding) if learned else None
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        if self.conv is not None:
            return self.conv(x)
        # A sum of four slices: on CPU, XLA would fuse a reduction into the preceding convolution, which is 3× slower.
        return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


class Upsample(nnx.Module):
    """Doubles height and width."""

    def __init__(self, channels: int, config: VQGANConfig, rngs: nnx.Rngs):
        self.uses_depth_to_space = config.upsample == "depth_to_space"
        self.conv = Conv(
            channels, 4 * channels if self.uses_depth_to_space else channels, 3, config.compute_dtype, rngs
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        if self.uses_depth_to_space:
            return depth_to_space(self.conv(x), 2)
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class Stage(nnx.Module):
    """Residual blocks at one resolution, then a resampling in all stages but the last."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, resample: type[Downsample] | type[Upsample] | None,
        config: VQGANConfig, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.blocks = nnx.List([ResidualBlock(outputs if j else inputs, outputs, config, rngs) for j in range(blocks)])
        self.resample = resample(outputs, config, rngs) if resample else None

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B h w outputs"]:
        for block in self.blocks:
            x = block(x)
        return self.resample(x) if self.resample is not None else x


def _stages(
    widths: tuple[int, ...], blocks: int, resample: type[Downsample] | type[Upsample],
    config: VQGANConfig, rngs: nnx.Rngs,
) -> nnx.List:  # fmt: skip
    """Stages of the given widths in the order that they run."""
    inputs, resamples = (widths[0], *widths[:-1]), [*[resample] * (len(widths) - 1), None]
    return nnx.List([Stage(i, o, blocks, r, config, rngs) for i, o, r in zip(inputs, widths, resamples, strict=True)])


class Encoder(nnx.Module):
    """Images to latents, before the quantizer's convolution."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        widths, patch, bias = config.widths, config.patch_size, config.block_bias
        self.conv_in = Conv(
            3, widths[0], 3 if patch == 1 else patch, config.compute_dtype, rngs, bias=bias, stride=patch
        )
        self.stages = _stages(widths, config.encoder_blocks, Downsample, config, rngs)
        self.middle = Stage(widths[-1], widths[-1], config.middle_blocks, None, config, rngs)
        self.norm_out = GroupNormSwish(widths[-1], config)
        self.conv_out = Conv(widths[-1], config.codebook_dim, config.latent_kernel, config.compute_dtype, rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = self.conv_in(images)  # [B, H/patch, W/patch, widths[0]]
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(self.norm_out(self.middle(x)))


class Decoder(nnx.Module):
    """Quantized latents to images. `stages[0]` runs first, at the lowest resolution."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        widths, patch = config.widths[::-1], config.patch_size
        self.conv_in = Conv(config.codebook_dim, widths[0], 3, config.compute_dtype, rngs)
        self.middle = Stage(widths[0], widths[0], config.middle_blocks, None, config, rngs)
        self.stages = _stages(widths, config.decoder_blocks, Upsample, config, rngs)
        self.norm_out = GroupNormSwish(widths[-1], config)
        self.conv_out = Conv(widths[-1], 3 * patch * patch, 3, config.compute_dtype, rngs)
        self.patch_size = patch

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        return self.to_images(self.features(latents))

    def features(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B _ _ F"]:
        """The input of the last convolution."""
        x = self.middle(self.conv_in(latents))  # [B, h, w, widths[-1]]
        for stage in self.stages:
            x = stage(x)
        return self.norm_out(x)

    def to_images(self, features: Float[Array, "B h w F"]) -> Float[Array, "B H W 3"]:
        """The last convolution."""
        return depth_to_space(self.conv_out(features), self.patch_size)


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder. Codes are in raster order; images are in [0, 1]."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        dim = config.codebook_dim
        self.quant_conv = Conv(dim, dim, 1, config.compute_dtype, rngs) if config.quant_convs else None
        self.post_quant_conv = Conv(dim, dim, 1, config.compute_dtype, rngs) if config.quant_convs else None
        quantizer_params = config.quantizer.init(config.codebook_size, dim, rngs.params())
        for name, value in quantizer_params.items():  # flat among the other parameters, as in published checkpoints
            setattr(self, name, nnx.Param(value, axes=(None,) * value.ndim))
        self._quantizer_names = tuple(quantizer_params)

    def encode_latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Latents in float32, as the quantizer compares them: with "l2_vq" of unit length, with "fsq" bounded."""
        latents = self.encoder(images)
        if self.quant_conv is not None:
            latents = self.quant_conv(latents)
        return self.config.quantizer.prepare(latents.astype(jnp.float32))

    def quantize(self, latents: Float[Array, "B h w C"]) -> Int[Array, "B N"]:
        B, h, w, _ = latents.shape
        return self.config.quantizer.quantize(self._quantizer_params(), latents).codes.reshape(B, h * w)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        return self.quantize(self.encode_latents(images))

    def decode_latents(self, quantized: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images in float32 of the codes' vectors, not clipped to [0, 1]."""
        return self.to_images(self.decoder_features(quantized))

    def decoder_features(self, quantized: Float[Array, "B h w C"]) -> Float[Array, "B _ _ F"]:
        """The input of the decoder's last convolution."""
        if self.post_quant_conv is not None:
            quantized = self.post_quant_conv(quantized)
        return self.decoder.features(quantized)

    def to_images(self, features: Float[Array, "B h w F"]) -> Float[Array, "B H W 3"]:
        """The decoder's last convolution, in float32 afterwards."""
        return self.decoder.to_images(features).astype(jnp.float32)

    def decode_float(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images in float32 of codes, not clipped to [0, 1]."""
        quantized = self.config.quantizer.lookup(self._quantizer_params(), codes)  # [B, N, C]
        return self.decode_latents(quantized.reshape(len(codes), *self.config.grid, -1))

    def _quantizer_params(self) -> Params:
        return {name: getattr(self, name)[...] for name in self._quantizer_names}


def quantizer_params(params: Params) -> Params:
    """The quantizer's part of a network's parameters."""
    return {name: value for name, value in params.items() if name not in _OWN_PARAMS}


def depth_to_space(x: Shaped[Array, "B H W depth"], factor: int) -> Shaped[Array, "B H*{factor} W*{factor} C"]:
    """Moves depth, ordered (row, column, channel), to `factor` × `factor` pixels."""
    B, H, W, depth = x.shape
    C = depth // factor**2
    x = x.reshape(B, H, W, factor, factor, C).transpose(0, 1, 3, 2, 4, 5)  # [B, H, r, W, r, C]
    return x.reshape(B, H * factor, W * factor, C)
