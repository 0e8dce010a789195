"""Logits of ConvNeXt-S, a perceptual loss of TA-TiTok and others."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from lvm.model.nnx_utils import Params
from tokenizer.perceptual import layers
from tokenizer.perceptual.base import ClassifierLoss, Shape

_STAGES = ((96, 3), (192, 3), (384, 27), (768, 3))  # channels, blocks


@dataclasses.dataclass(frozen=True)
class ConvNeXtSmall(ClassifierLoss):
    """See `ClassifierLoss`."""

    kind: ClassVar[str] = "convnext_small"
    url: ClassVar[str] = "https://download.pytorch.org/models/convnext_small-0c510722.pth"

    def tensor_shapes(self) -> dict[str, Shape]:
        """See `Perceptual.tensor_shapes`."""
        shapes: dict[str, Shape] = {}
        inputs = 3
        for i, (channels, blocks) in enumerate(_STAGES):
            # features.0 is a convolution and a norm, features.2, 4 and 6 a norm and a convolution.
            first, size = (("0.0", "0.1"), 4) if i == 0 else ((f"{2 * i}.1", f"{2 * i}.0"), 2)
            shapes |= _pair(f"features.{first[0]}", (channels, inputs, size, size))
            shapes |= _pair(f"features.{first[1]}", (channels if i == 0 else inputs,))
            for j in range(blocks):
                name = f"features.{2 * i + 1}.{j}"
                shapes[f"{name}.layer_scale"] = (channels, 1, 1)
                shapes |= _pair(f"{name}.block.0", (channels, 1, 7, 7)) | _pair(f"{name}.block.2", (channels,))
                shapes |= _pair(f"{name}.block.3", (4 * channels, channels))
                shapes |= _pair(f"{name}.block.5", (channels, 4 * channels))
            inputs = channels
        return shapes | _pair("classifier.0", (768,)) | _pair("classifier.2", (1000, 768))

    def logits(self, params: Params, images: Float[Array, "B 224 224 3"], dtype: str) -> Float[Array, "B classes"]:
        """See `ClassifierLoss.logits`."""
        features, x = params["features"], images
        for i, (_, blocks) in enumerate(_STAGES):
            step = features[str(2 * i)]
            if i == 0:
                x = layers.layer_norm(step["1"], layers.conv(step["0"], x, dtype, stride=4, padding="VALID"))
            else:
                x = layers.conv(step["1"], layers.layer_norm(step["0"], x), dtype, stride=2, padding="VALID")
            for j in range(blocks):
                x = x + _block(features[str(2 * i + 1)][str(j)], x, dtype)
        x = layers.layer_norm(params["classifier"]["0"], x.mean((1, 2)))
        return layers.linear(params["classifier"]["2"], x, dtype)


def _pair(name: str, size: Shape) -> dict[str, Shape]:
    """Shapes of a weight and its bias."""
    return {f"{name}.weight": size, f"{name}.bias": size[:1]}


def _block(params: Params, x: jax.Array, dtype: str) -> jax.Array:
    block = params["block"]
    y = layers.layer_norm(block["2"], layers.conv(block["0"], x, dtype, groups=x.shape[-1]))
    y = layers.linear(block["5"], jax.nn.gelu(layers.linear(block["3"], y, dtype), approximate=False), dtype)
    return y * params["layer_scale"][:, 0, 0].astype(dtype)
