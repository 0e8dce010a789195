"""Flax NNX modules as pure functions of nested dicts of arrays.

Everything that is stored, sharded or differentiated is a nested dict with string keys, so that checkpoints,
optimizers and converters never see a Flax type.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]  # nested, string keys, jax.Array leaves


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the parameters of a module."""
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, _map_keys(str, nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The inverse of `split`; works under `jax.jit`."""
    # `nnx.List` indexes its items with integers; attribute names are never digits.
    return nnx.merge(graphdef, nnx.State(_map_keys(lambda key: int(key) if key.isdigit() else key, params)))


def init_params(make_module: Callable[[nnx.Rngs], nnx.Module], rng: jax.Array) -> Params:
    """Initial parameters, a pure function of `rng`: jit it with output shardings to create them sharded."""
    return split(make_module(nnx.Rngs(params=rng)))[1]


def abstract_module(make_module: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the parameters' ShapeDtypeStructs; allocates nothing."""
    return split(_eval_shape(make_module))


def logical_axes(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Params:
    """Logical axes of each parameter, as declared by `nnx.Param(..., axes=...)`.

    Parameters of stacked modules have leading dimensions beyond those declared; their logical axis is "layers".
    """

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        declared = variable.get_metadata()["axes"]
        return ("layers",) * (variable.get_value().ndim - len(declared)) + tuple(declared)

    state = nnx.state(_eval_shape(make_module), nnx.Param)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return _map_keys(str, nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=is_variable)))


def count_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _eval_shape(make_module: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    return nnx.eval_shape(lambda: make_module(nnx.Rngs(params=jax.random.key(0))))


def _map_keys(function: Callable[[Any], Any], tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {function(key): _map_keys(function, value) for key, value in tree.items()}
