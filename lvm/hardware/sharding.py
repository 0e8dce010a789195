"""The device mesh, and the table that maps logical axes to mesh axes."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from lvm.common.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")

# logical axis → mesh axes; () is replicated
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
    "norm": (),  # too small to shard
    "head_dim": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis. One axis may be -1: all remaining devices."""

    data: int = -1  # data parallelism over replicated parameters; TPU slices are connected along this axis
    fsdp: int = 1  # parameters, optimizer state and batch are sharded; weights are gathered a layer at a time
    sequence: int = 1  # rows are sharded along their length, for contexts that do not fit one device
    tensor: int = 1  # heads, the MLP's inner dimension and the vocabulary are sharded
    zero1: bool = False  # shards the optimizer state over `data` too


def resolve_mesh(config: MeshConfig, num_devices: int) -> MeshConfig:
    """Replaces -1 by the devices that the other axes leave, rounded down.

    Raises:
      UserError: several axes are -1, or one is neither -1 nor positive.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = [size for size in sizes.values() if size != -1]
    if len(sizes) - len(fixed) > 1 or min(fixed) < 1:
        raise UserError(f"config.mesh={sizes}: one axis may be -1, the others must be positive")
    remaining = max(1, num_devices // math.prod(fixed))
    return dataclasses.replace(config, **{axis: remaining for axis, size in sizes.items() if size == -1})


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes `AXES`, each of type `Auto`.

    On several TPU slices, the slow network between slices carries `data` only.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices, or `data` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    config = resolve_mesh(config, len(devices))
    shape = [getattr(config, axis) for axis in AXES]
    if (product := math.prod(shape)) != len(devices):
        factors = " × ".join(map(str, shape))
        raise UserError(f"config.mesh: {factors} = {product} devices, but there are {len(devices)}")
    # Only TPUs have slices: GPUs report their NVLink domain as `slice_index`, which FSDP may well cross.
    is_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    # `allow_split_physical_axes`: few mesh shapes fit a three-dimensional torus otherwise.
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(f"config.mesh.data={shape[0]} must be a multiple of the {slices} slices")
    else:
        within, between = [shape[0] // slices, *shape[1:]], [slices, *[1] * (len(AXES) - 1)]
        array = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Context in which functions are traced for `mesh`; a no-op for None or one device."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `use_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: Shaped[Array, "*shape"], *axes: str | None) -> Shaped[Array, "*shape"]:
    """Shards `x` by its logical axes over the current mesh, if there is one."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, partition_spec(axes))


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of logical axes, by `RULES`.

    Raises:
      ValueError: an unknown logical axis, or two that map to one mesh axis.
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

    A leaf takes the logical axes of the parameter whose path is the end of its own (as of optimizer moments), if the
    numbers of dimensions agree; all others are replicated.

    Args:
      tree: arrays or ShapeDtypeStructs.
      axes: nested dict of logical axes, a tuple per parameter.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
    """
    flat, _ = jax.tree.flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    by_path = {_names(path): value for path, value in flat}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            matching = by_path.get(names[start:])
            # Size 1 is no moment of a parameter: factored optimizers use it as a placeholder.
            if matching is not None and len(matching) == leaf.ndim and leaf.size > 1:
                _check_divisible(matching, leaf.shape, mesh, names)
                return NamedSharding(mesh, partition_spec(matching))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Sharding of a batch's arrays: the first dimension over `data` and `fsdp`.

    Raises:
      UserError: they do not divide the batch.
    """
    size = axis_size(mesh, ("data", "fsdp"))
    if batch_size % size:
        raise UserError(f"config.batch_size={batch_size} must be divisible by the mesh's data × fsdp = {size}")
    return NamedSharding(mesh, partition_spec(("batch",)))


def zero1_shardings(tree: Any, mesh: Mesh, shardings: Any) -> Any:
    """ZeRO-1: `shardings` of `tree`, with `data` added to the largest dimension that it divides evenly.

    Arrays without such a dimension (scalars, small norms) keep their sharding.
    """
    data = mesh.shape["data"]

    def add_data(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        entries = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
        for dimension in sorted(range(leaf.ndim), key=lambda i: -leaf.shape[i]):
            entry = entries[dimension]
            axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            if data > 1 and leaf.shape[dimension] % (data * axis_size(mesh, axes)) == 0:
                entries[dimension] = (*axes, "data")  # minor-most, so that shards nest within the parameter's
                return NamedSharding(mesh, PartitionSpec(*entries))
        return sharding

    return jax.tree.map(add_data, tree, shardings)


def axis_size(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Number of devices along `axes`."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _check_divisible(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, names: Sequence[str]) -> None:
    for dimension, axis in zip(shape, axes, strict=True):
        size = axis_size(mesh, RULES.get(axis or "", ()))
        if dimension % size:
            raise UserError(f"config.mesh: {'/'.join(names)} has dimension {dimension}, not divisible by {size}")
