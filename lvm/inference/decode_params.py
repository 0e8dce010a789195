"""Transformer parameters laid out for decoding: compute dtype, unrolled layers, matrices as [outputs, inputs].

A decode step is bound by reading the weights. In [outputs, inputs] order a CPU reads each matrix sequentially; the
module gets transposed views.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from lvm.hardware import sharding
from lvm.model.nnx_utils import Params, abstract_module, logical_axes, merge
from lvm.model.transformer import ModelConfig, Transformer

_NOT_MATRICES = ("embedding", "scale")  # keep their layout


def decode_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh with its `sequence` axis merged into `data`: a decode step has nothing to split along the length."""
    if mesh is None or mesh.shape["sequence"] == 1:
        return mesh
    data, fsdp, sequence, tensor = (mesh.shape[axis] for axis in sharding.AXES)
    devices = np.swapaxes(mesh.devices, 1, 2).reshape(data * sequence, fsdp, 1, tensor)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def prepare_params(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Lays out a `Transformer`'s stacked parameters for `build_module`, as a copy on `mesh` or on their own devices.

    Raises UserError if the mesh doesn't divide a dimension.
    """
    params = params if mesh is None else place_params(params, config, mesh)
    return _lay_out(params, config, mesh)


def place_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Moves a `Transformer`'s parameters to the devices of `mesh`, unless they are there.

    Raises UserError if the mesh doesn't divide a dimension.
    """
    devices = set(mesh.devices.flat)
    target = sharding.shardings(mesh, params, logical_axes(lambda rngs: Transformer(config, rngs)))

    def move(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        is_there = isinstance(x, jax.Array) and x.sharding.device_set == devices
        return x if is_there else jax.device_put(x, sharding)

    return jax.tree.map(move, params, target)


def build_module(params: Params, config: ModelConfig) -> Transformer:
    """The `Transformer` with unrolled layers over prepared parameters; for use inside `jax.jit`."""
    graphdef, shapes = _unrolled(config)

    def to_module(path: Any, x: jax.Array, like: Any) -> jax.Array:
        return x if path[-1].key in _NOT_MATRICES else x.T.reshape(like.shape)

    return merge(graphdef, jax.tree.map_with_path(to_module, params, shapes))


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _lay_out(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    def transpose(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key not in _NOT_MATRICES:
            x = x.reshape(math.prod(x.shape[: _num_inputs(path)]), -1).T  # [outputs, inputs]
        return x.astype(config.dtype) if x.ndim > 1 else x  # norm scales are used in float32

    def transpose_axes(path: Any, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
        # Heads and head dim are one dimension here, split as the heads are.
        return axes if path[-1].key in _NOT_MATRICES else (axes[_num_inputs(path)], axes[0])

    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers)}
    params = jax.tree.map_with_path(transpose, {**params, "layers": layers})
    if mesh is None:
        return params
    axes = logical_axes(lambda rngs: Transformer(config, rngs, stacked=False))
    axes = jax.tree.map_with_path(transpose_axes, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return jax.lax.with_sharding_constraint(params, sharding.shardings(mesh, params, axes))


@functools.lru_cache(maxsize=16)
def _unrolled(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    return abstract_module(lambda rngs: Transformer(config, rngs, stacked=False))


def _num_inputs(path: Any) -> int:
    """Number of leading dimensions of a module's weight that are summed over."""
    return 2 if path[-1].key == "out" else 1  # heads and head dim
