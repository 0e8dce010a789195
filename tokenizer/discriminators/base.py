"""The protocol of discriminators, and layers that they share."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Judgment = tuple[Float[Array, "B h w"], list[jax.Array]]  # logits of patches, float32, and features of each layer


class Network(nnx.Module, abc.ABC):
    """A network from images in [0, 1] to logits of patches, large for real ones."""

    @abc.abstractmethod
    def __call__(self, images: Float[Array, "B H W 3"]) -> Judgment:
        """Logits, and the features that feature matching compares."""


class Discriminator(abc.ABC):
    """Settings of a network; a family of dataclasses selected by `kind`.

    Attributes:
      min_batch: images that its statistics need.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Discriminator]]] = {}
    min_batch: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Discriminator.kinds[cls.kind] = cls

    @property
    @abc.abstractmethod
    def min_resolution(self) -> int:
        """Smallest side of an image that leaves a logit."""

    @abc.abstractmethod
    def build(self, dtype: str, rngs: nnx.Rngs) -> Network:
        """A fresh network, with parameters in float32 and convolutions in `dtype`."""


class Norm(nnx.Module):
    """Normalization with float32 statistics: of groups of an image's channels, or of each channel of the batch."""

    def __init__(self, channels: int, groups: int | None):
        self.scale = nnx.Param(jnp.ones(channels), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels), axes=(None,))
        self.groups = groups

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        groups, axes = (C, (0, 1, 3)) if self.groups is None else (self.groups, (1, 3))
        y = x.astype(jnp.float32).reshape(B, H * W, groups, C // groups)
        y = y - y.mean(axes, keepdims=True)
        y = (y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + 1e-5)).reshape(B, H, W, C)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def leaky_relu(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """max(x, x / 5)."""
    return jax.nn.leaky_relu(x, 0.2)
