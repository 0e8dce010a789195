"""The discriminator of pix2pix and VQGAN."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float

from lvm.common.validation import check_positive
from tokenizer.convolution import Conv
from tokenizer.discriminators.base import Discriminator, Judgment, Network, Norm, leaky_relu

_PAD = ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class PatchGAN(Discriminator):
    """Strided 4×4 convolutions with batch normalization (pix2pix, arXiv 1611.07004), by the batch's own statistics.

    Attributes:
      channels: of the first layer; each further one has twice as many, up to eight times.
      layers: strided ones; the receptive field of a logit is 70 pixels with three.
    """

    kind: ClassVar[str] = "patchgan"
    min_batch: ClassVar[int] = 2
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        check_positive(self, "channels", "layers")

    @property
    def min_resolution(self) -> int:
        """See `Discriminator.min_resolution`."""
        return 3 * 2**self.layers

    def build(self, dtype: str, rngs: nnx.Rngs) -> Network:
        """See `Discriminator.build`."""
        return _PatchGANNetwork(self, dtype, rngs)


class _PatchGANNetwork(Network):
    def __init__(self, config: PatchGAN, dtype: str, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        strides = [2] * config.layers + [1]
        inputs = [3, *widths[:-1]]
        convs = [
            Conv(i, o, 4, dtype, rngs, bias=n == 0, stride=stride, padding=_PAD)
            for n, (i, o, stride) in enumerate(zip(inputs, widths, strides, strict=True))
        ]
        self.convs = nnx.List(convs)
        self.norms = nnx.List([Norm(width, None) for width in widths[1:]])
        self.conv_out = Conv(widths[-1], 1, 4, dtype, rngs, padding=_PAD)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Judgment:
        x, features = 2 * images - 1, []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = leaky_relu(self.norms[i - 1](x) if i else x)
            features.append(x)
        return self.conv_out(x)[..., 0].astype("float32"), features
