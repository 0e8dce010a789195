"""A transformer's weights as writing wants them: in the compute dtype, a layer by itself, and laid out for one token.

A product with one row reads its matrix once and does little else. Each matrix is stored as [outputs, inputs], so that a
CPU reads it in order; the module gets it back as a view.
"""

from __future__ import annotations

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

_AS_THEY_ARE = ("embedding", "scale")


def decode_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh's devices with `sequence` counted to `data`: a row of one token can't be split along its length."""
    if mesh is None or mesh.shape["sequence"] == 1:
        return mesh
    data, fsdp, sequence, tensor = (mesh.shape[axis] for axis in sharding.AXES)
    devices = np.swapaxes(mesh.devices, 1, 2).reshape(data * sequence, fsdp, 1, tensor)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def prepare_params(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """The weights for `build_module`, of a `Transformer`'s parameters with stacked layers.

    Args:
      params: as training has them; they stay as they are.
      config: the model.
      mesh: where the weights go; None leaves them where they are.

    Raises:
      UserError: the mesh doesn't divide a dimension.
    """
    if mesh is not None:
        axes = logical_axes(lambda rngs: Transformer(config, rngs))
        placed = sharding.shardings(mesh, params, axes)
        here = set(mesh.devices.flat)
        move = lambda x, sharding: x if _devices(x) == here else jax.device_put(x, sharding)  # noqa: E731
        params = jax.tree.map(move, params, placed)
    return _laid_out(params, config, mesh)


def build_module(weights: Params, config: ModelConfig) -> Transformer:
    """The `Transformer` with layers one by one around prepared weights; inside `jax.jit`."""
    graphdef, shapes = _one_by_one(config)
    return merge(graphdef, jax.tree.map_with_path(_as_module, weights, shapes))


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _laid_out(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers)}
    weights = jax.tree.map_with_path(_as_rows, {**params, "layers": layers})
    # Norms' scales are used in float32.
    weights = jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > 1 else x, weights)
    if mesh is None:
        return weights
    axes = logical_axes(lambda rngs: Transformer(config, rngs, stacked=False))
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    axes = jax.tree.map_with_path(_row_axes, axes, is_leaf=is_axes)
    return jax.lax.with_sharding_constraint(weights, sharding.shardings(mesh, weights, axes))


@functools.lru_cache(maxsize=16)
def _one_by_one(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    return abstract_module(lambda rngs: Transformer(config, rngs, stacked=False))


def _num_inputs(path: Any) -> int:
    """How many dimensions of a module's weight are summed over: the first ones."""
    return 2 if path[-1].key == "out" else 1  # heads and their size


def _as_rows(path: Any, x: jax.Array) -> jax.Array:
    if path[-1].key in _AS_THEY_ARE:
        return x
    return x.reshape(math.prod(x.shape[: _num_inputs(path)]), -1).T  # [outputs, inputs]


def _as_module(path: Any, x: jax.Array, like: Any) -> jax.Array:
    return x if path[-1].key in _AS_THEY_ARE else x.T.reshape(like.shape)


def _row_axes(path: Any, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    # Heads and their size are one dimension here: it is split where the heads are.
    return axes if path[-1].key in _AS_THEY_ARE else (axes[_num_inputs(path)], axes[0])


def _devices(x: Any) -> set[Any]:
    return x.sharding.device_set if isinstance(x, jax.Array) else set()
