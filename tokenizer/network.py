"""The image ↔ code model: a convolutional encoder, a codebook and a decoder (VQGAN, arXiv 2012.09841).

One class covers the three published networks (`VARIANTS`) and smaller ones: they differ in settings alone.
Images are NHWC floats in [0, 1], kernels HWIO. Parameters are float32; the convolutions run in
`compute_dtype`, while norms' statistics and the quantizer's distances are always float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lvm.common.errors import UserError
from tokenizer import quantizers

_CHOICES = {
    "shortcut": ("input", "output"),
    "downsample": ("average", "strided_conv"),
    "upsample": ("nearest_conv", "depth_to_space"),
    "latent_kernel": (1, 3),
    "compute_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """A network. The defaults are those of "lvm", the network released with LVM."""

    resolution: int = 256  # pixels a side
    patch_size: int = 1  # the first convolution is patch_size × patch_size with that stride; 1: a plain 3×3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)  # one a stage; each further stage halves the side
    encoder_blocks: int = 2  # residual blocks a stage
    decoder_blocks: int = 3
    middle_blocks: int = 2  # residual blocks at the lowest resolution, in the encoder and in the decoder
    codebook_size: int = 8192
    codebook_dim: int = 64
    norm_groups: int = 32
    block_bias: bool = True  # biases in the residual blocks' and the encoder's first convolutions
    shortcut: str = "input"  # "output": where channels change a block gives h + W·h of its own output
    downsample: str = "strided_conv"  # or "average": 2×2 mean
    upsample: str = "nearest_conv"  # or "depth_to_space": a 3×3 to 4C, then [h2 w2 c] to space
    latent_kernel: int = 3  # the encoder's last convolution: 1 or 3
    quant_convs: bool = True  # a 1×1 before and one after the quantizer
    l2_normalize: bool = False  # latents and codebook rows of unit length
    compute_dtype: str = "float32"  # or "bfloat16"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _reject(name, getattr(self, name), f"one of {choices}")
        for name in ("resolution", "patch_size", "channels", "encoder_blocks", "decoder_blocks",
                     "codebook_size", "codebook_dim", "norm_groups"):  # fmt: skip
            if getattr(self, name) < 1:
                _reject(name, getattr(self, name), "a positive integer")
        if self.middle_blocks < 0:
            _reject("middle_blocks", self.middle_blocks, "0 or more")
        if self.codebook_size > 65536:
            _reject("codebook_size", self.codebook_size, "at most 65536: codes are stored as uint16")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            _reject("channel_multipliers", self.channel_multipliers, "a positive integer for each stage")
        if self.resolution % self.downsampling:
            _reject("resolution", self.resolution, f"a multiple of {self.downsampling}, the downsampling")
        for width in self.widths:
            if width % self.norm_groups:
                _reject("norm_groups", self.norm_groups, f"a divisor of every stage's channels {self.widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the highest resolution to the lowest."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels of a code's side: f."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's codes."""
        side = self.resolution // self.downsampling
        return side, side

    @property
    def num_codes_per_image(self) -> int:
        """Codes of one image."""
        rows, columns = self.grid
        return rows * columns


def _reject(key: str, found: Any, right: str) -> None:
    raise UserError(f"{key}: {found!r}, expected {right}")


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


class Conv(nnx.Module):
    """A 2-D convolution, [B, H, W, in] → [B, H/stride, W/stride, out]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, config: VQGANConfig, rngs: nnx.Rngs,
        *, bias: bool = True, stride: int = 1, padding: Any = "SAME",
    ):  # fmt: skip
        initial = nnx.initializers.lecun_normal()(rngs.params(), (kernel, kernel, inputs, outputs))
        self.kernel = nnx.Param(initial, axes=(None, None, None, None))
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None,)) if bias else None
        self.stride = stride
        self.padding = padding
        self.dtype = config.compute_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            # float32 is asked for when codes must be right: not TF32, which GPUs would take by default.
            precision="highest" if self.dtype == "float32" else None,
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class GroupNormSwish(nnx.Module):
    """Group normalisation (float32 statistics, epsilon 1e-6), then x · sigmoid(x). Keeps shape and dtype."""

    def __init__(self, channels: int, config: VQGANConfig):
        self.scale = nnx.Param(jnp.ones(channels), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels), axes=(None,))
        self.groups = config.norm_groups

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        y = x.astype(jnp.float32).reshape(B, H * W, self.groups, C // self.groups)  # [B, HW, G, C/G]
        mean = y.mean((1, 3), keepdims=True)  # [B, 1, G, 1]
        variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(B, H, W, C)
        return jax.nn.swish(y * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm → swish → 3×3 → norm → swish → 3×3, and a shortcut. [B, H, W, in] → [B, H, W, out]."""

    def __init__(self, inputs: int, outputs: int, config: VQGANConfig, rngs: nnx.Rngs):
        bias = config.block_bias
        self.norm1 = GroupNormSwish(inputs, config)
        self.conv1 = Conv(inputs, outputs, 3, config, rngs, bias=bias)
        self.norm2 = GroupNormSwish(outputs, config)
        self.conv2 = Conv(outputs, outputs, 3, config, rngs, bias=bias)
        self.shortcut_of = config.shortcut
        shortcut_inputs = inputs if config.shortcut == "input" else outputs
        changes = inputs != outputs
        self.shortcut = Conv(shortcut_inputs, outputs, 1, config, rngs, bias=bias) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(self.norm1(x))  # [B, H, W, out]
        h = self.conv2(self.norm2(h))
        if self.shortcut is None:
            return h + x
        return h + self.shortcut(x if self.shortcut_of == "input" else h)


class Downsample(nnx.Module):
    """[B, H, W, C] → [B, H/2, W/2, C]."""

    def __init__(self, channels: int, config: VQGANConfig, rngs: nnx.Rngs):
        learned = config.downsample == "strided_conv"
        padding = ((0, 1), (0, 1))
        self.conv = Conv(channels, channels, 3, config, rngs, stride=2, padding=padding) if learned else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.conv is not None:
            return self.conv(x)
        # As a sum of four, not a reduction: on a CPU XLA would fuse that into the convolution before it, which then
        # takes three times as long.
        return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


class Upsample(nnx.Module):
    """[B, H, W, C] → [B, 2H, 2W, C]."""

    def __init__(self, channels: int, config: VQGANConfig, rngs: nnx.Rngs):
        self.by_depth = config.upsample == "depth_to_space"
        self.conv = Conv(channels, 4 * channels if self.by_depth else channels, 3, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.by_depth:
            return depth_to_space(self.conv(x), 2)
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class Stage(nnx.Module):
    """Residual blocks at one resolution, then a change of resolution unless it is the last stage."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, resample: type[Downsample] | type[Upsample] | None,
        config: VQGANConfig, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.blocks = nnx.List(
            [ResidualBlock(outputs if j else inputs, outputs, config, rngs) for j in range(blocks)]
        )
        self.resample = resample(outputs, config, rngs) if resample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.resample(x) if self.resample is not None else x


class Encoder(nnx.Module):
    """Images [B, H, W, 3] → latents [B, h, w, codebook_dim]."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        widths, patch, bias = config.widths, config.patch_size, config.block_bias
        self.conv_in = Conv(3, widths[0], 3 if patch == 1 else patch, config, rngs, bias=bias, stride=patch)
        self.stages: nnx.List[Stage] = nnx.List([])
        for i, width in enumerate(widths):
            resample = Downsample if i + 1 < len(widths) else None
            inputs = widths[max(i - 1, 0)]
            self.stages.append(Stage(inputs, width, config.encoder_blocks, resample, config, rngs))
        self.middle = Stage(widths[-1], widths[-1], config.middle_blocks, None, config, rngs)
        self.norm_out = GroupNormSwish(widths[-1], config)
        self.conv_out = Conv(widths[-1], config.codebook_dim, config.latent_kernel, config, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv_in(images)  # [B, H/patch, W/patch, widths[0]]
        for stage in self.stages:
            x = stage(x)
        x = self.middle(x)  # [B, h, w, widths[-1]]
        return self.conv_out(self.norm_out(x))


class Decoder(nnx.Module):
    """Quantized latents [B, h, w, codebook_dim] → images [B, H, W, 3]. `stages[0]` runs first."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        widths, patch = config.widths[::-1], config.patch_size
        self.conv_in = Conv(config.codebook_dim, widths[0], 3, config, rngs)
        self.middle = Stage(widths[0], widths[0], config.middle_blocks, None, config, rngs)
        self.stages: nnx.List[Stage] = nnx.List([])
        for i, width in enumerate(widths):
            resample = Upsample if i + 1 < len(widths) else None
            inputs = widths[max(i - 1, 0)]
            self.stages.append(Stage(inputs, width, config.decoder_blocks, resample, config, rngs))
        self.norm_out = GroupNormSwish(widths[-1], config)
        self.conv_out = Conv(widths[-1], 3 * patch * patch, 3, config, rngs)
        self.patch_size = patch

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(latents))  # [B, h, w, widths[-1]]
        for stage in self.stages:
            x = stage(x)
        x = self.conv_out(self.norm_out(x))  # [B, H/patch, W/patch, 3·patch²]
        return depth_to_space(x, self.patch_size)


class VQGAN(nnx.Module):
    """Images ↔ codes. See `VQGANConfig` for the settings and `VARIANTS` for the published networks."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        dim = config.codebook_dim
        self.quant_conv = Conv(dim, dim, 1, config, rngs) if config.quant_convs else None
        self.post_quant_conv = Conv(dim, dim, 1, config, rngs) if config.quant_convs else None
        rows = jax.random.normal(rngs.params(), (config.codebook_size, dim))
        self.codebook = nnx.Param(quantizers.normalize(rows), axes=(None, None))

    def encode_latents(self, images: jax.Array) -> jax.Array:
        """Images float [B, H, W, 3] in [0, 1] → latents float32 [B, h, w, C], as the quantizer compares them.

        With `l2_normalize` each has unit length.
        """
        latents = self.encoder(images)  # [B, h, w, C]
        if self.quant_conv is not None:
            latents = self.quant_conv(latents)
        latents = latents.astype(jnp.float32)
        return quantizers.normalize(latents) if self.config.l2_normalize else latents

    def quantize(self, latents: jax.Array) -> jax.Array:
        """Latents float32 [B, h, w, C] → codes int32 [B, h·w] in raster order."""
        B, h, w, _ = latents.shape
        return quantizers.nearest_codes(latents, self.codebook[...]).reshape(B, h * w)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images float [B, H, W, 3] in [0, 1] → codes int32 [B, h·w] in raster order."""
        return self.quantize(self.encode_latents(images))

    def decode_latents(self, quantized: jax.Array) -> jax.Array:
        """Codebook rows float32 [B, h, w, C] → images float32 [B, H, W, 3], not yet clipped to [0, 1]."""
        if self.post_quant_conv is not None:
            quantized = self.post_quant_conv(quantized)
        return self.decoder(quantized).astype(jnp.float32)

    def decode_float(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [B, N] of square grids → images float32 [B, H, W, 3], not yet clipped to [0, 1]."""
        B, _ = codes.shape
        quantized = quantizers.lookup(codes, self.codebook[...])  # [B, N, C]
        return self.decode_latents(quantized.reshape(B, *self.config.grid, -1))


def depth_to_space(x: jax.Array, factor: int) -> jax.Array:
    """[B, H, W, factor·factor·C], the depth ordered (row, column, channel) → [B, H·factor, W·factor, C]."""
    B, H, W, depth = x.shape
    C = depth // factor**2
    x = x.reshape(B, H, W, factor, factor, C).transpose(0, 1, 3, 2, 4, 5)  # [B, H, r, W, r, C]
    return x.reshape(B, H * factor, W * factor, C)
