"""Flax NNX modules as pure functions: a module is split once into a graph and a plain dict of arrays.

Everything that is stored, sharded or differentiated is a nested dict of arrays with string keys, so that
checkpoints, optimizers and converters never meet a Flax type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]  # nested, string keys, jax.Array leaves


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module's graph and its parameters as a plain nested dict."""
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, _with_keys(str, nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module again, around the given arrays. Works inside `jax.jit`."""
    return nnx.merge(graphdef, nnx.State(_with_keys(_list_index, params)))


def init_params(make_module: Callable[[nnx.Rngs], nnx.Module], rng: jax.Array) -> Params:
    """Fresh parameters, a pure function of `rng`: jit it with output shardings to make them sharded."""
    return split(make_module(nnx.Rngs(params=rng)))[1]


def abstract_module(make_module: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """The graph and the parameters' shapes, without allocating anything."""
    module = nnx.eval_shape(lambda: make_module(nnx.Rngs(params=jax.random.key(0))))
    return split(module)


def logical_axes(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Params:
    """Each parameter's logical axes, as declared by `nnx.Param(..., axes=...)`.

    Modules that are stacked (a leading layer dimension) have one more dimension than they declared: its
    logical axis is "layers".
    """
    module = nnx.eval_shape(lambda: make_module(nnx.Rngs(params=jax.random.key(0))))

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        declared = variable.get_metadata()["axes"]
        stacked = variable.get_value().ndim - len(declared)
        return ("layers",) * stacked + tuple(declared)

    state = nnx.state(module, nnx.Param)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return _with_keys(str, nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=is_variable)))


def count_params(params: Params) -> int:
    """How many numbers a (possibly abstract) parameter tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _with_keys(rename: Callable[[Any], Any], tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {rename(key): _with_keys(rename, value) for key, value in tree.items()}


def _list_index(key: str) -> str | int:
    # An `nnx.List` counts its members with integers; attribute names never are digits.
    return int(key) if key.isdigit() else key
