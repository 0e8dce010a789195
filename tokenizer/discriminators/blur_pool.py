"""A discriminator that blurs before it downsamples."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lvm.common.errors import UserError
from lvm.common.validation import check_positive
from tokenizer.convolution import Conv
from tokenizer.discriminators.base import Discriminator, Judgment, Network, Norm, leaky_relu


@dataclasses.dataclass(frozen=True)
class BlurPool(Discriminator):
    """3×3 convolutions, each blurred and halved, with group normalization: that of VQGAN+ (arXiv 2409.16211).

    Blurring before subsampling (arXiv 1904.11486), as in StyleGAN's, keeps the generator from artifacts of the grid.

    Attributes:
      channels: of the first layer; the stages have 1, 2, 4, … times as many, up to eight times.
      stages: halvings.
      norm_groups: of each norm.
    """

    kind: ClassVar[str] = "blur_pool"
    channels: int = 128
    stages: int = 3
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_positive(self, "channels", "stages", "norm_groups")
        if self.channels % self.norm_groups:
            raise UserError(f"norm_groups={self.norm_groups} must divide channels={self.channels}")

    @property
    def min_resolution(self) -> int:
        """See `Discriminator.min_resolution`; sides are multiples of it."""
        return 2**self.stages

    def build(self, dtype: str, rngs: nnx.Rngs) -> Network:
        """See `Discriminator.build`."""
        return _BlurPoolNetwork(self, dtype, rngs)


class _BlurPoolNetwork(Network):
    def __init__(self, config: BlurPool, dtype: str, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, 8) for i in range(config.stages)]
        self.conv_in = Conv(3, config.channels, 5, dtype, rngs)
        inputs = [config.channels, *widths[:-1]]
        self.convs = nnx.List([Conv(i, o, 3, dtype, rngs) for i, o in zip(inputs, widths, strict=True)])
        self.norms = nnx.List([Norm(width, config.norm_groups) for width in widths])
        self.conv_middle = Conv(widths[-1], widths[-1], 1, dtype, rngs)
        self.conv_out = Conv(widths[-1], 1, 5, dtype, rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Judgment:
        x = leaky_relu(self.conv_in(2 * images - 1))
        features = [x]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(blur_pool(conv(x))))
            features.append(x)
        return self.conv_out(leaky_relu(self.conv_middle(x)))[..., 0].astype("float32"), features


def blur_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Halves height and width, which are even, after a blur by [1, 3, 3, 1] / 8 in both directions; zeros outside."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        size = x.shape[axis] - 2
        a, b, c, d = (jax.lax.slice_in_dim(x, i, i + size - 1, 2, axis) for i in range(4))
        x = (a + 3 * b + 3 * c + d) / 8
    return x
