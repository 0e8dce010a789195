"""A restored state is the saved one, bit for bit."""

import errno
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvm.common import files
from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import checksums
from lvm.training.checkpoint import FOLDER, Checkpoints, latest_step, load_params


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
    assert latest_step(saved) == 5
    assert sorted(saved.rglob("*")) == before
    assert latest_step(tmp_path) is None
    assert os.listdir(tmp_path) == []


def test_a_save_that_was_cut_off_does_not_count(saved):
    unfinished = saved / FOLDER / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert latest_step(saved) == 5
    unfinished.rmdir()


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(new_state(step=step), step, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
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


def test_a_save_that_fails_in_the_background_ends_the_next_one(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orbax.checkpoint._src.checkpointers.async_checkpointer._on_commit_callback", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(new_state(step=1), 1, {})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}"):
        checkpoints.save(new_state(step=2), 2, {})
    checkpoints.close()
    assert latest_step(tmp_path) is None


def largest_file(folder, step):
    return max(
        (folder / FOLDER / str(step) / "params").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def fresh(tmp_path):
    """A workdir with the states of steps 3 and 5, to be damaged."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 5):
        checkpoints.save(new_state(seed=step, step=step), step, {})
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "checksum mismatch"),
        (cut_short, r"\d+ bytes, expected \d+"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(fresh, caplog, damage, words):
    path = largest_file(fresh, 5)
    damage(path)
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 3
    assert re.search(
        f"damaged checkpoint: {re.escape(str(path))}: {words}; going back to step 3", caplog.text
    )
    restored, _ = checkpoints.restore(3, abstract(new_state()))
    assert_equal_bits(restored, new_state(seed=3, step=3))
    # What was damaged is kept aside, and the step can be saved again.
    assert (fresh / "damaged-checkpoints" / "5-0").is_dir()
    checkpoints.save(new_state(seed=5, step=5), 5, {})
    checkpoints.wait()
    assert checkpoints.latest_intact_step() == 5
    checkpoints.close()


def test_a_model_is_not_loaded_from_damaged_parameters(fresh):
    flip_a_byte(largest_file(fresh, 5))
    with pytest.raises(UserError, match=r"damaged checkpoint: .*/params/.*: checksum mismatch"):
        load_params(fresh, jax.eval_shape(lambda: new_state()["params"]))


def test_where_all_are_damaged_nothing_is_begun_anew(fresh):
    for step in (3, 5):
        flip_a_byte(largest_file(fresh, step))
    checkpoints = Checkpoints(fresh, keep=2)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoints.latest_intact_step()
    checkpoints.close()
    assert latest_step(fresh) == 5


def test_an_unreadable_file_is_tried_again_and_is_no_damage(fresh, monkeypatch):
    waited, calls = [], []
    monkeypatch.setattr(checksums.time, "sleep", waited.append)

    def failing(path):
        calls.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checksums, "_checksum", failing)
    checkpoints = Checkpoints(fresh, keep=2)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.latest_intact_step()
    checkpoints.close()
    assert {1.0, 4.0, 16.0} <= set(waited)
    assert latest_step(fresh) == 5


def test_checkpoint_without_checksums_is_used_and_logged(fresh, caplog):
    (fresh / "checksums" / "5.json").unlink()
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 5
    checkpoints.close()
    assert "has no checksums; used without verification" in caplog.text


def test_checksums_go_with_their_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(new_state(step=step), step, {})
        checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["4", "6", "7"]
    assert sorted(path.stem for path in (tmp_path / "checksums").iterdir()) == ["4", "6", "7"]
