"""The device mesh, and the one table that says which of its axes a logical axis is split over."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lvm.common.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")

# logical axis → mesh axes. An axis that isn't listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
    "norm": (),  # too small to be worth gathering
    "head_dim": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: whatever the others leave.

    Attributes:
      data: copies of the parameters, each with its own part of the batch; slices of a pod are told apart here.
      fsdp: parameters, optimizer and batch are split; weights are gathered a layer at a time.
      sequence: rows are split along their length, for contexts that one device can't hold.
      tensor: heads, the inner size of the MLP and the vocabulary are split.
      zero1: the optimizer's state is split over `data` too.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    zero1: bool = False


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the four axes, each of type `Auto`.

    On TPUs of several slices, `data` goes over the slices (the slow network between them) first.

    Raises:
      UserError: the axes don't multiply to the number of devices, or `data` not to that of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"config.mesh: {dict(zip(AXES, sizes, strict=True))}; one axis may be -1, the rest ≥ 1"
        )
    shape = [max(1, len(devices) // fixed) if size == -1 else size for size in sizes]
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh: {' × '.join(map(str, shape))} = {math.prod(shape)} devices, "
            f"but there are {len(devices)}"
        )
    return Mesh(_arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours on an axis near each other on the network."""
    slices = _num_slices(devices)
    # A mesh axis may take a part of a torus axis: without that, few shapes fit a three-dimensional torus.
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"config.mesh.data: {shape[0]} is not a multiple of the {slices} slices")
    within = [shape[0] // slices, *shape[1:]]
    between = [slices, *[1] * (len(AXES) - 1)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def _num_slices(devices: Sequence[Any]) -> int:
    # Other platforms number something else by this name: GPUs their NVLink domains, which FSDP may well cross.
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While a function is traced under this, `current_mesh` is the mesh; with None or one device nothing is split."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` split by its logical axes over the mesh in use."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, partition_spec(axes))


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
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
            # One number alone is no moment of a parameter: factored optimizers keep it where they keep nothing.
            if found is not None and len(found) == leaf.ndim and leaf.size > 1:
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
    return NamedSharding(mesh, partition_spec(("batch",)))


def zero1_shardings(tree: Any, mesh: Mesh, placed: Any) -> Any:
    """ZeRO-1: the shardings `placed` of `tree`, with `data` added to the largest dimension that it divides evenly.

    Arrays without such a dimension (scalars, small norms) stay as they were.
    """
    data = mesh.shape["data"]

    def split(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        entries = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
        for dimension in sorted(range(leaf.ndim), key=lambda i: -leaf.shape[i]):
            entry = entries[dimension]
            axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            if data > 1 and leaf.shape[dimension] % (data * axis_size(mesh, axes)) == 0:
                entries[dimension] = (*axes, "data")  # within the parameter's own part, so that parts nest
                return NamedSharding(mesh, PartitionSpec(*entries))
        return sharding

    return jax.tree.map(split, tree, placed)


def axis_size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _divisible(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, names: Sequence[str]
) -> PartitionSpec:
    for size, axis in zip(shape, axes, strict=True):
        ways = axis_size(mesh, RULES.get(axis or "", ()))
        if size % ways:
            raise UserError(
                f"config.mesh: {'/'.join(names)} has a dimension of {size}, not divisible by {ways}"
            )
    return partition_spec(axes)
