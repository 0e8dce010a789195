"""Meshes of eight CPU devices, and shardings of arrays on them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.hardware.sharding import MeshConfig, make_mesh

AXES = {"embedding": ("vocabulary", "embed"), "layers": {"up": ("layers", "embed", "mlp"), "scale": (None,)}}
PARAMS = {"embedding": jnp.zeros((16, 8)), "layers": {"up": jnp.zeros((2, 8, 4)), "scale": jnp.zeros(8)}}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=2, sequence=1, tensor=2), (2, 2, 1, 2)),
    ],
)
def test_make_mesh_infers_one_axis(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_make_mesh_over_given_devices():
    devices = jax.devices()[2:4]
    assert list(make_mesh(MeshConfig(), devices).devices.ravel()) == devices


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"config\.mesh: 3 × 1 × 1 × 1 = 3 devices, but there are 8"),
        (MeshConfig(fsdp=3), r"config\.mesh: 2 × 3 × 1 × 1 = 6 devices, but there are 8"),
        (MeshConfig(fsdp=16), r"config\.mesh: 1 × 16 × 1 × 1 = 16 devices, but there are 8"),
        (MeshConfig(fsdp=-1), r"config\.mesh=.*'fsdp': -1.*one axis may be -1"),
        (MeshConfig(tensor=0), r"config\.mesh=.*'tensor': 0.*one axis may be -1"),
    ],
)
def test_make_mesh_rejects_axes_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_partition_spec_follows_the_rules():
    assert sharding.partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.partition_spec(("vocabulary", "embed")) == PartitionSpec(("tensor",), ("fsdp",))
    assert sharding.partition_spec(("layers", "head_dim")) == PartitionSpec(None, None)


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("embed", "embed"), ("batch", "embed")])
def test_partition_spec_rejects_colliding_axes(axes):
    with pytest.raises(ValueError, match=f"{axes[0]}.*{axes[1]}.*collide"):
        sharding.partition_spec(axes)


def test_partition_spec_names_an_unknown_axis():
    with pytest.raises(ValueError, match="'embde' is not in the rules"):
        sharding.partition_spec(("embde",))


def test_shardings_of_moments_are_those_of_parameters():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "step": jnp.int32(0),
        "params": PARAMS,
        "training": {"optimizer": optimizer.init(PARAMS)},
    }
    shardings = sharding.shardings(mesh, state, AXES)
    on_mesh = lambda *entries: NamedSharding(mesh, PartitionSpec(*entries))  # noqa: E731
    assert shardings["params"]["embedding"] == on_mesh(("tensor",), ("fsdp",))
    assert shardings["params"]["layers"]["up"] == on_mesh(None, ("fsdp",), ("tensor",))
    assert shardings["step"] == on_mesh()
    moments = [x for x in jax.tree.leaves(shardings["training"]) if x.spec != PartitionSpec()]
    for name in ("embedding", "layers"):
        expected = jax.tree.leaves(shardings["params"][name])
        assert all(moments.count(sharding) >= 2 for sharding in expected)  # first and second moment


def test_shardings_split_arrays_on_devices():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    arrays = jax.device_put(PARAMS, sharding.shardings(mesh, PARAMS, AXES))
    assert arrays["embedding"].addressable_shards[0].data.shape == (8, 2)
    assert arrays["layers"]["scale"].addressable_shards[0].data.shape == (8,)


def test_shardings_name_an_indivisible_dimension():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(UserError, match=r"config\.mesh: layers/up has dimension 6, not divisible by 8"):
        sharding.shardings(mesh, {"layers": {"up": jnp.zeros((2, 6, 4))}}, AXES)


def test_batch_sharding_splits_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = jax.device_put(jnp.zeros((8, 3)), sharding.batch_sharding(mesh, 8))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_batch_sharding_rejects_an_indivisible_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(UserError, match=r"config\.batch_size=6 .* = 4"):
        sharding.batch_sharding(mesh, 6)
