"""LPIPS: learned distances of VGG16's features."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lvm.common.validation import check_non_negative
from lvm.model.nnx_utils import Params
from tokenizer.perceptual import layers
from tokenizer.perceptual.base import Perceptual, Shape, read_weights, to_params

# Channels of VGG16's convolutions, by the blocks whose last activations are compared, and their names' numbers.
_BLOCKS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_HEADS_URL = "the lpips package, as lpips/weights/v0.1/vgg.pth,"
# Colors in [-1, 1] are shifted and scaled by these, a rounded form of ImageNet's statistics.
_SHIFT, _SCALE = np.array([-0.030, -0.088, -0.188], np.float32), np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class LPIPS(Perceptual):
    """Squared differences of VGG16's unit features, weighted by learned heads (LPIPS 0.1, arXiv 1801.03924).

    Attributes:
      weights: file with torchvision's VGG16, `features.N.weight` and `features.N.bias`.
      heads: file with the linear heads, `linI.model.1.weight`.
    """

    kind: ClassVar[str] = "lpips"
    min_resolution: ClassVar[int] = 16
    weight: float = 1.0
    weights: str = ""
    heads: str = ""

    def __post_init__(self) -> None:
        check_non_negative(self, "weight")

    def tensor_shapes(self) -> dict[str, Shape]:
        """See `Perceptual.tensor_shapes`."""
        return _backbone_shapes() | _head_shapes()

    def load(self, setting: str = "config.loss.perceptual.") -> Params:
        """See `Perceptual.load`."""
        backbone = read_weights(self.weights, _backbone_shapes(), f"{setting}weights", self.kind, _URL)
        heads = read_weights(self.heads, _head_shapes(), f"{setting}heads", self.kind, _HEADS_URL)
        return to_params(backbone | heads)

    def distance(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, ""]:
        """See `Perceptual.distance`."""
        return jnp.mean(self.distances(params, images, targets, dtype))

    def distances(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, " B"]:
        """Distance of each image in [0, 1] from its target, float32."""
        total = jnp.zeros(len(images))
        pairs = zip(_features(params, images, dtype), _features(params, targets, dtype), strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            head = params[f"lin{i}"]["model"]["1"]["weight"][0, 0, :, 0]  # [C]
            total += jnp.mean(jnp.sum(jnp.square(_unit(ours) - _unit(theirs)) * head, -1), (1, 2))
        return total


def _backbone_shapes() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    inputs = 3
    for number, channels in (convolution for block in _BLOCKS for convolution in block):
        shapes |= {f"features.{number}.weight": (channels, inputs, 3, 3), f"features.{number}.bias": (channels,)}
        inputs = channels
    return shapes


def _head_shapes() -> dict[str, Shape]:
    return {f"lin{i}.model.1.weight": (1, block[-1][1], 1, 1) for i, block in enumerate(_BLOCKS)}


def _features(params: Params, images: jax.Array, dtype: str) -> list[jax.Array]:
    x, features = ((2 * images - 1) - _SHIFT) / _SCALE, []
    for i, block in enumerate(_BLOCKS):
        x = layers.max_pool(x, 2, 2) if i else x
        for number, _ in block:
            x = jax.nn.relu(layers.conv(params["features"][str(number)], x, dtype))
        features.append(x)
    return features


def _unit(x: jax.Array) -> jax.Array:
    # Epsilon under the root: that of LPIPS, added to the root, has no finite gradient where all features are 0.
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-20)
