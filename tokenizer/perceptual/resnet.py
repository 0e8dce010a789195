"""Logits of ResNet-50, the perceptual loss of VQGAN+."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from lvm.model.nnx_utils import Params
from tokenizer.perceptual import layers
from tokenizer.perceptual.base import ClassifierLoss, Shape

_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # inner channels, blocks, stride of the first block
_PAD = ((1, 1), (1, 1))  # torch pads both sides, "SAME" with a stride mostly one


@dataclasses.dataclass(frozen=True)
class ResNet50(ClassifierLoss):
    """See `ClassifierLoss`."""

    kind: ClassVar[str] = "resnet50"
    url: ClassVar[str] = "https://download.pytorch.org/models/resnet50-0676ba61.pth"

    def tensor_shapes(self) -> dict[str, Shape]:
        """See `Perceptual.tensor_shapes`."""
        shapes: dict[str, Shape] = {"conv1.weight": (64, 3, 7, 7)} | _norm_shapes("bn1", 64)
        inputs = 64
        for i, (inner, blocks, _) in enumerate(_STAGES, 1):
            for j in range(blocks):
                name, outputs = f"layer{i}.{j}", 4 * inner
                sizes = [(inner, inputs, 1, 1), (inner, inner, 3, 3), (outputs, inner, 1, 1)]
                for k, size in enumerate(sizes, 1):
                    shapes |= {f"{name}.conv{k}.weight": size} | _norm_shapes(f"{name}.bn{k}", size[0])
                if j == 0:
                    shapes |= {f"{name}.downsample.0.weight": (outputs, inputs, 1, 1)}
                    shapes |= _norm_shapes(f"{name}.downsample.1", outputs)
                inputs = outputs
        return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}

    def logits(self, params: Params, images: Float[Array, "B 224 224 3"], dtype: str) -> Float[Array, "B classes"]:
        """See `ClassifierLoss.logits`."""
        x = layers.conv(params["conv1"], images, dtype, stride=2, padding=((3, 3), (3, 3)))
        x = layers.max_pool(jax.nn.relu(layers.batch_norm(params["bn1"], x)), 3, 2, padding=1)
        for i, (_, blocks, stride) in enumerate(_STAGES, 1):
            for j in range(blocks):
                x = _block(params[f"layer{i}"][str(j)], x, dtype, stride if j == 0 else 1)
        return layers.linear(params["fc"], x.mean((1, 2)), dtype)


def _norm_shapes(name: str, channels: int) -> dict[str, Shape]:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def _block(params: Params, x: jax.Array, dtype: str, stride: int) -> jax.Array:
    y = jax.nn.relu(layers.batch_norm(params["bn1"], layers.conv(params["conv1"], x, dtype)))
    y = layers.conv(params["conv2"], y, dtype, stride=stride, padding=_PAD)
    y = layers.conv(params["conv3"], jax.nn.relu(layers.batch_norm(params["bn2"], y)), dtype)
    if "downsample" in params:
        x = layers.conv(params["downsample"]["0"], x, dtype, stride=stride)
        x = layers.batch_norm(params["downsample"]["1"], x)
    return jax.nn.relu(layers.batch_norm(params["bn3"], y) + x)
