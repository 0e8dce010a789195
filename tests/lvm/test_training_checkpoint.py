"""A restored state is the saved one, bit for bit."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvm import files
from lvm.errors import UserError
from lvm.mesh import MeshConfig, make_mesh
from lvm.training.checkpoint import FOLDER, Checkpoints, load_params, newest_step


def new_state(seed=0, step=3):
    kernel, gradient = jax.random.normal(jax.random.key(seed), (2, 8, 4))
    params = {"layer": {"kernel": kernel}, "scale": jnp.float32(1 / 3)}
    optimizer = optax.adamw(optax.linear_schedule(0.1, 0.0, 10))
    gradients = {"layer": {"kernel": gradient}, "scale": jnp.float32(0.1)}
    _, moments = optimizer.update(gradients, optimizer.init(params), params)
    return {"step": jnp.int32(step), "params": params, "training": {"optimizer": moments}}


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the states of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 5):
        checkpoints.save(new_state(seed=step, step=step), step, {"note": f"of step {step}"})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("step", [3, 5])
def test_parameters_moments_step_and_meta_come_back(saved, step):
    state = new_state(seed=step, step=step)
    checkpoints = Checkpoints(saved, read_only=True)
    restored, meta = checkpoints.restore(step, abstract(state))
    checkpoints.close()
    assert_equal_bits(restored, state)
    assert meta == {"note": f"of step {step}"}


def test_a_state_comes_back_onto_another_mesh(saved):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = new_state(seed=5, step=5)
    split = lambda x: NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec())  # noqa: E731
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split(x)), state)
    checkpoints = Checkpoints(saved, read_only=True)
    restored, _ = checkpoints.restore(5, wanted)
    checkpoints.close()
    assert_equal_bits(restored, state)
    assert restored["params"]["layer"]["kernel"].addressable_shards[0].data.shape == (1, 4)
    assert restored["step"].sharding.is_fully_replicated


def test_the_newest_parameters_load_without_the_rest_onto_one_device(saved):
    state = new_state(seed=5)
    params, step = load_params(saved, jax.eval_shape(lambda: state["params"]))
    assert step == 5
    assert_equal_bits(params, state["params"])
    assert params["scale"].devices() == {jax.devices()[0]}


def test_looking_changes_nothing(saved, tmp_path):
    before = sorted(saved.rglob("*"))
    assert newest_step(saved) == 5
    assert sorted(saved.rglob("*")) == before
    assert newest_step(tmp_path) is None
    assert os.listdir(tmp_path) == []


def test_a_save_that_was_cut_off_does_not_count(saved):
    unfinished = saved / FOLDER / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert newest_step(saved) == 5
    unfinished.rmdir()


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(new_state(step=step), step, {})
    checkpoints.wait()
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["2", "3"]


def test_a_workdir_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoint yet"):
        load_params(tmp_path, {})


def test_a_full_disk_is_an_os_error_however_it_was_wrapped(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}") as error, files.clear_disk_errors(tmp_path):
        raise ValueError(f"write failed: {os.strerror(errno.ENOSPC)} [some library]")
    assert error.value.errno == errno.ENOSPC


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match=r"^shapes differ$"), files.clear_disk_errors(tmp_path):
        raise ValueError("shapes differ")


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="No space left on device: a checkpoint needs"):
        checkpoints.save({"params": {"a": jnp.zeros(4)}, "training": {"b": jnp.zeros(4)}}, 1, {})
    assert list((tmp_path / FOLDER).iterdir()) == []
