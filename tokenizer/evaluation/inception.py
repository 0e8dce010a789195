"""Features of FID: the Inception network of 2015 that TensorFlow's evaluators use, with weights from a local file.

The graph is that of torch-fidelity and pytorch-fid, whose weights it reads: average pools leave padding out, and the
last block's pool takes maxima.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lvm.model.nnx_utils import Params
from tokenizer.perceptual import layers
from tokenizer.perceptual.base import Shape, read_weights, to_params

NUM_FEATURES = 2048
_SIDE = 299
_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class _Conv(NamedTuple):
    """A convolution with batch normalization and a rectifier; one of stride 2 has no padding."""

    name: str
    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1


class _Block(NamedTuple):
    """Branches whose outputs are concatenated. Convolutions side by side at a branch's end are too."""

    name: str
    branches: tuple[tuple[_Conv | tuple[_Conv, _Conv], ...], ...]
    pool: str  # "average", "max", or "stride": a maximum of stride 2, whose block has no `pool_channels`
    pool_channels: int = 0  # of the convolution after the pool


_STEM = (_Conv("Conv2d_1a_3x3", 32, (3, 3), 2), _Conv("Conv2d_2a_3x3", 32, (3, 3)), _Conv("Conv2d_2b_3x3", 64, (3, 3)))
_STEM2 = (_Conv("Conv2d_3b_1x1", 80), _Conv("Conv2d_4a_3x3", 192, (3, 3)))
_UNPADDED = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3")


def _block_a(name: str, pool_channels: int) -> _Block:
    double = (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3)))
    fives = (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5)))
    return _Block(name, ((_Conv("branch1x1", 64),), fives, double), "average", pool_channels)


def _block_c(name: str, channels: int) -> _Block:
    across, down = (1, 7), (7, 1)
    sevens = (
        _Conv("branch7x7_1", channels), _Conv("branch7x7_2", channels, across), _Conv("branch7x7_3", 192, down)
    )  # fmt: skip
    double = (
        _Conv("branch7x7dbl_1", channels), _Conv("branch7x7dbl_2", channels, down),
        _Conv("branch7x7dbl_3", channels, across), _Conv("branch7x7dbl_4", channels, down),
        _Conv("branch7x7dbl_5", 192, across),
    )  # fmt: skip
    return _Block(name, ((_Conv("branch1x1", 192),), sevens, double), "average", 192)


def _block_e(name: str, pool: str) -> _Block:
    def halves(name: str) -> tuple[_Conv, _Conv]:
        return _Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))

    threes = (_Conv("branch3x3_1", 384), halves("branch3x3_2"))
    double = (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3)), halves("branch3x3dbl_3"))
    return _Block(name, ((_Conv("branch1x1", 320),), threes, double), pool, 192)


_BLOCKS = (
    _block_a("Mixed_5b", 32), _block_a("Mixed_5c", 64), _block_a("Mixed_5d", 64),
    _Block("Mixed_6a", (
        (_Conv("branch3x3", 384, (3, 3), 2),),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    ), "stride"),
    _block_c("Mixed_6b", 128), _block_c("Mixed_6c", 160), _block_c("Mixed_6d", 160), _block_c("Mixed_6e", 192),
    _Block("Mixed_7a", (
        (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2)),
        (_Conv("branch7x7x3_1", 192), _Conv("branch7x7x3_2", 192, (1, 7)), _Conv("branch7x7x3_3", 192, (7, 1)),
         _Conv("branch7x7x3_4", 192, (3, 3), 2)),
    ), "stride"),
    _block_e("Mixed_7b", "average"), _block_e("Mixed_7c", "max"),
)  # fmt: skip


def tensor_shapes() -> dict[str, Shape]:
    """Names and shapes of the weights, as in torch: `NAME.conv.weight` [O, I, h, w] and `NAME.bn.…` [O]."""
    shapes: dict[str, Shape] = {}

    def add(conv: _Conv, prefix: str, inputs: int) -> int:
        shapes[f"{prefix}{conv.name}.conv.weight"] = (conv.channels, inputs, *conv.size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}{conv.name}.bn.{name}"] = (conv.channels,)
        return conv.channels

    channels = 3
    for conv in (*_STEM, *_STEM2):
        channels = add(conv, "", channels)
    for block in _BLOCKS:
        prefix, outputs = f"{block.name}.", 0
        for branch in block.branches:
            width = channels
            for step in branch:
                width = (
                    add(step, prefix, width) if isinstance(step, _Conv) else sum(add(c, prefix, width) for c in step)
                )
            outputs += width
        pooled = _pool_conv(block)
        channels = outputs + (add(pooled, prefix, channels) if pooled else channels)
    return shapes


def load(path: str, key: str) -> Params:
    """Reads the weights, float32, convolutions as HWIO; `fc` and others are ignored.

    Raises:
      UserError: no path, a file that can't be read, or the tensors of another network; `key` is the path's setting.
    """
    return to_params(read_weights(path, tensor_shapes(), key, "FID", _URL))


def features(params: Params, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
    """Features of images by clean-fid's conventions (arXiv 2104.11222)."""
    x = (resize(images) - 128) / 128
    for convs in (_STEM, _STEM2):
        for conv in convs:
            x = _conv(params, conv, x)
        x = layers.max_pool(x, 3, 2)
    for block in _BLOCKS:
        x = _apply(params[block.name], block, x)
    return x.mean((1, 2))


def resize(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Images at the network's size, in [0, 255]: bicubic with antialiasing in float32, as Pillow does."""
    resized = jax.image.resize(images.astype(jnp.float32), (len(images), _SIDE, _SIDE, 3), "bicubic", antialias=True)
    return jnp.clip(resized, 0, 255)


def _apply(params: Params, block: _Block, x: jax.Array) -> jax.Array:
    outputs = []
    for branch in block.branches:
        y = x
        for step in branch:
            parts = (step,) if isinstance(step, _Conv) else step
            y = jnp.concatenate([_conv(params, conv, y) for conv in parts], -1)
        outputs.append(y)
    pooled = {"average": _average_pool, "max": lambda x: layers.max_pool(x, 3, 1, 1)}.get(
        block.pool, lambda x: layers.max_pool(x, 3, 2)
    )(x)
    conv = _pool_conv(block)
    return jnp.concatenate([*outputs, _conv(params, conv, pooled) if conv else pooled], -1)


def _pool_conv(block: _Block) -> _Conv | None:
    return _Conv("branch_pool", block.pool_channels) if block.pool_channels else None


def _conv(params: Params, conv: _Conv, x: jax.Array) -> jax.Array:
    padding = "VALID" if conv.stride > 1 or conv.name in _UNPADDED else "SAME"
    x = layers.conv(params[conv.name]["conv"], x, "float32", stride=conv.stride, padding=padding)
    return jax.nn.relu(layers.batch_norm(params[conv.name]["bn"], x, epsilon=1e-3))


def _average_pool(x: jax.Array) -> jax.Array:
    """Means of 3×3 windows over the pixels inside the image."""
    add = lambda y: jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")  # noqa: E731
    return add(x) / add(np.ones((1, *x.shape[1:3], 1), np.float32))
