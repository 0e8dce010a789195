"""The device mesh, and the one table that says which of its axes a logical axis is split over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lvm.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")

# logical axis → mesh axes. An axis that isn't listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
    "head_dim": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: whatever the others leave."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the four axes, each of type `Auto`.

    Raises:
      UserError: the axes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"config.mesh: {dict(zip(AXES, sizes, strict=True))}; one axis may be -1, the rest ≥ 1"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"config.mesh: {' × '.join(map(str, shape))} = {int(np.prod(shape))} devices, "
            f"but there are {len(devices)}"
        )
    if shape[AXES.index("sequence")] > 1:
        raise UserError(
            f"config.mesh.sequence: {shape[AXES.index('sequence')]}; no array is split over it yet, so 1"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array with these logical axes, by `RULES`.

    Raises:
      ValueError: an unknown logical axis, or two that would be split over one mesh axis.
    """
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in the rules: {sorted(RULES)}")
    entries = [RULES[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} collide on the mesh axes {used}")
    return PartitionSpec(*[entry if entry else None for entry in entries])


def shardings(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """A sharding for each array of `tree`.

    A leaf takes the logical axes of the parameter whose path its own path ends with (optimizer moments have
    their parameter's path at their end) if the number of dimensions agrees; everything else is replicated.

    Args:
      mesh: where the arrays live.
      tree: arrays or their shapes.
      axes: nested dict of logical axes, a tuple at each parameter.
    """
    flat, _ = jax.tree.flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    by_path = {_names(path): value for path, value in flat}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            found = by_path.get(names[start:])
            if found is not None and len(found) == leaf.ndim:
                return NamedSharding(mesh, _divisible(found, leaf.shape, mesh, names))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """The first dimension of every array of a batch is split over `data` and `fsdp`.

    Raises:
      UserError: they don't divide the batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(
            f"config.batch_size: {batch_size} is not divisible by the mesh's data × fsdp = {ways}"
        )
    return NamedSharding(mesh, spec(("batch",)))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _divisible(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, names: Sequence[str]
) -> PartitionSpec:
    for size, axis in zip(shape, axes, strict=True):
        ways = int(np.prod([mesh.shape[mesh_axis] for mesh_axis in RULES.get(axis or "", ())]))
        if size % ways:
            raise UserError(
                f"config.mesh: {'/'.join(names)} has a dimension of {size}, not divisible by {ways}"
            )
    return spec(axes)
