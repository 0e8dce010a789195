"""Sweep language: spaces of points, which are mappings from keys to values, for the config files of sweeps.

    product(param("budget", 1e18, 3e18), chain(param("width", 512, 768), listed(SIZES["300m"])))

A key is a field of `lvm.scaling.config.Point` or a key of the training configuration, such as "optimizer.b2". The
combinators are those of google-deepmind/simply's sweeps; a space is a plain tuple, so comprehensions work on it too.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.model.transformer import ModelConfig

Space = tuple[Mapping[str, Any], ...]


def param(key: str, *values: Any) -> Space:
    """One point for each value of a key."""
    return tuple({key: value} for value in values)


def listed(*models: ModelConfig) -> Space:
    """One point for each model: its shape, to be taken as listed."""
    return tuple(
        {
            "width": model.hidden_size,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "mlp_size": model.mlp_size,
        }
        for model in models
    )


def product(*spaces: Space) -> Space:
    """Every combination of a point of each space; the last space varies fastest.

    Raises:
      UserError: two spaces set the same key.
    """
    return tuple(_merge(points) for points in itertools.product(*spaces))


def zip_spaces(*spaces: Space) -> Space:
    """The i-th points of all spaces, merged.

    Raises:
      UserError: the spaces differ in length, or two set the same key.
    """
    if len({len(space) for space in spaces}) > 1:
        raise UserError(f"zip_spaces: spaces of {', '.join(str(len(s)) for s in spaces)} points; give equal numbers")
    return tuple(_merge(points) for points in zip(*spaces, strict=True))


def chain(*spaces: Space) -> Space:
    """The points of all spaces, one space after another."""
    return tuple(itertools.chain(*spaces))


def subsample(space: Space, count: int, seed: int = 0) -> Space:
    """`count` points at random, in their order.

    Raises:
      UserError: the space has fewer points.
    """
    if not 0 <= count <= len(space):
        raise UserError(f"subsample: count={count} of a space of {len(space)} points; use at most {len(space)}")
    chosen = np.random.default_rng(seed).choice(len(space), count, replace=False)
    return tuple(space[i] for i in sorted(chosen.tolist()))


def isoflop(budgets: Sequence[float], shapes: Space) -> Space:
    """Every shape at every budget of FLOPs."""
    return product(param("budget", *budgets), shapes)


def chinchilla_grid(shapes: Space, tokens_per_param: Sequence[float]) -> Space:
    """Every shape at every ratio of tokens to parameters."""
    return product(shapes, param("tokens_per_param", *tokens_per_param))


def decay_branches(shapes: Space, tokens: Sequence[float]) -> Space:
    """Every shape at every number of tokens; those of a shape branch off one run with a WSD schedule, to decay."""
    return product(shapes, param("branch", True), param("tokens", *tokens))


def learning_rate_grid(space: Space, learning_rates: Sequence[float], batch_sizes: Sequence[int]) -> Space:
    """Every point of a space with every learning rate and every batch size in rows."""
    return product(space, param("batch_size", *batch_sizes), param("learning_rate", *learning_rates))


def _merge(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        if repeated := merged.keys() & point.keys():
            raise UserError(f"{sorted(repeated)[0]!r} is set by two spaces of a product or zip; set it in one")
        merged.update(point)
    return merged
