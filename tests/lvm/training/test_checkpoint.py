"""Checkpoints: bit-exact restore, retention, full disks and damaged files."""

import contextlib
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
from orbax.checkpoint._src.serialization import tensorstore_utils

from lvm.common import files
from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import checksums
from lvm.training.checkpoint import FOLDER, Checkpoints, intact_step, latest_step, load_params


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


def test_save_needs_no_file_locks(tmp_path, no_file_locks, monkeypatch):
    options = "_DEFAULT_OCDBT_TS_CONTEXT"  # changed by `Checkpoints`
    monkeypatch.setattr(tensorstore_utils, options, dict(getattr(tensorstore_utils, options)))
    no_file_locks(errno.ENOSYS)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert tensorstore_utils.get_ts_context()["file_io_locking"].to_json() == {"mode": "none"}
        checkpoints.save(new_state(), 3, {})
    assert latest_step(tmp_path) == 3


@pytest.mark.parametrize("step", [3, 5])
def test_restore_returns_saved_bits_and_meta(saved, step):
    state = new_state(seed=step, step=step)
    checkpoints = Checkpoints(saved, read_only=True)
    restored, meta = checkpoints.restore(step, abstract(state))
    checkpoints.close()
    assert_equal_bits(restored, state)
    assert meta == {"note": f"of step {step}"}


def test_restore_reshards_onto_mesh(saved):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = new_state(seed=5, step=5)
    split = lambda x: NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec())  # noqa: E731
    resharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split(x)), state)
    checkpoints = Checkpoints(saved, read_only=True)
    restored, _ = checkpoints.restore(5, resharded)
    checkpoints.close()
    assert_equal_bits(restored, state)
    assert restored["params"]["layer"]["kernel"].addressable_shards[0].data.shape == (1, 4)
    assert restored["step"].sharding.is_fully_replicated


def test_load_params_reads_latest_onto_one_device(saved):
    state = new_state(seed=5)
    params, step = load_params(saved, jax.eval_shape(lambda: state["params"]))
    assert step == 5
    assert_equal_bits(params, state["params"])
    assert params["scale"].devices() == {jax.devices()[0]}


def test_latest_step_changes_nothing(saved, tmp_path):
    before = sorted(saved.rglob("*"))
    assert latest_step(saved) == 5
    assert sorted(saved.rglob("*")) == before
    assert latest_step(tmp_path) is None
    assert os.listdir(tmp_path) == []


def test_latest_step_ignores_unfinished_save(saved):
    unfinished = saved / FOLDER / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert latest_step(saved) == 5
    unfinished.rmdir()


def test_save_keeps_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(new_state(step=step), step, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["2", "3"]


def test_load_params_names_empty_workdir(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoint yet"):
        load_params(tmp_path, {})


def test_clear_disk_errors_unwraps_full_disk(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}") as error, files.clear_disk_errors(tmp_path):
        raise ValueError(f"write failed: {os.strerror(errno.ENOSPC)} [some library]")
    assert error.value.errno == errno.ENOSPC


def test_clear_disk_errors_passes_others(tmp_path):
    with pytest.raises(ValueError, match=r"^shapes differ$"), files.clear_disk_errors(tmp_path):
        raise ValueError("shapes differ")


def test_save_refuses_full_disk_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="No space left on device: a checkpoint needs"):
        checkpoints.save({"params": {"a": jnp.zeros(4)}, "training": {"b": jnp.zeros(4)}}, 1, {})
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_failed_background_save_raises_at_next_save(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orbax.checkpoint._src.checkpointers.async_checkpointer._on_commit_callback", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(new_state(step=1), 1, {})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}"):
        checkpoints.save(new_state(step=2), 2, {})
    checkpoints.close()
    assert latest_step(tmp_path) is None


def largest_file(folder, step, item="params"):
    return max(
        (folder / FOLDER / str(step) / item).rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def fresh(saved, tmp_path):
    """A copy of `saved` for one test to damage."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, "checksum mismatch"),
        (cut_short, r"\d+ bytes, expected \d+"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_damaged_checkpoint_falls_back_to_previous(fresh, caplog, damage, problem):
    path = largest_file(fresh, 5)
    damage(path)
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 3
    assert re.search(f"damaged checkpoint: {re.escape(str(path))}: {problem}; going back to step 3", caplog.text)
    restored, _ = checkpoints.restore(3, abstract(new_state()))
    assert_equal_bits(restored, new_state(seed=3, step=3))
    # The damaged checkpoint is quarantined, and the step can be saved again.
    assert (fresh / "damaged-checkpoints" / "5-0").is_dir()
    checkpoints.save(new_state(seed=5, step=5), 5, {})
    checkpoints.wait()
    assert checkpoints.latest_intact_step() == 5
    checkpoints.close()


def test_load_params_refuses_damaged_parameters(fresh):
    flip_a_byte(largest_file(fresh, 5))
    with pytest.raises(UserError, match=r"damaged checkpoint: .*/params/.*: checksum mismatch"):
        load_params(fresh, jax.eval_shape(lambda: new_state()["params"]))


def test_load_params_verifies_parameters_alone(fresh):
    flip_a_byte(largest_file(fresh, 5, "training"))
    _, step = load_params(fresh, jax.eval_shape(lambda: new_state()["params"]))
    assert step == 5


def test_all_damaged_is_an_error(fresh):
    for step in (3, 5):
        flip_a_byte(largest_file(fresh, step))
    checkpoints = Checkpoints(fresh, keep=2)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoints.latest_intact_step()
    checkpoints.close()
    assert latest_step(fresh) == 5


def test_unreadable_file_is_retried_not_damaged(fresh, monkeypatch):
    delays = []
    monkeypatch.setattr(checksums.time, "sleep", delays.append)

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checksums, "_checksum", failing)
    checkpoints = Checkpoints(fresh, keep=2)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.latest_intact_step()
    checkpoints.close()
    assert {1.0, 4.0, 16.0} <= set(delays)
    assert latest_step(fresh) == 5


@pytest.mark.parametrize("record", [None, b"\0" * 50])
def test_checkpoint_without_checksums_is_read_and_logged(fresh, caplog, record):
    path = fresh / "checksums" / "5.json"
    path.unlink() if record is None else path.write_bytes(record)
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 5
    checkpoints.close()
    assert "its arrays are read instead" in caplog.text


@pytest.mark.parametrize(
    ("item", "damage"),
    [
        ("params", lambda path: path.unlink()),
        ("training", cut_short),
        ("training", lambda path: path.write_bytes(b"\0" * 1000)),
    ],
)
def test_part_of_a_copy_falls_back_without_checksums(fresh, caplog, item, damage):
    (fresh / "checksums" / "5.json").unlink()
    damage(max((fresh / FOLDER / "5" / item / "d").iterdir(), key=lambda path: path.stat().st_size))
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 3
    checkpoints.close()
    assert f"damaged checkpoint: {fresh / FOLDER / '5' / item}" in caplog.text


@pytest.mark.parametrize(("lost", "step"), [("params", 7), ("training", 7), ("meta", 7), (None, 7), (None, 4)])
def test_folder_that_lacks_parts_is_no_checkpoint(fresh, caplog, lost, step):
    folder = fresh / FOLDER / str(step)
    if lost is None:
        folder.mkdir()
    else:
        shutil.copytree(fresh / FOLDER / "5", folder)
        shutil.rmtree(folder / lost)
    assert latest_step(fresh) == 5
    assert load_params(fresh, jax.eval_shape(lambda: new_state()["params"]))[1] == 5
    with pytest.raises(UserError, match=f"no checkpoint of step {step}; it has 3, 5"):
        intact_step(fresh, step)
    checkpoints = Checkpoints(fresh, keep=2)
    assert checkpoints.latest_intact_step() == 5
    assert (fresh / "damaged-checkpoints" / f"{step}-0").is_dir() == (step > 5)
    checkpoints.save(new_state(step=6), 6, {})
    checkpoints.close()
    assert latest_step(fresh) == 6
    assert (f"{folder}: lacks {lost or 'params, training, meta'}" in caplog.text) == (step > 5)


def test_checksums_are_deleted_with_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4, keep_steps=(3,))
    for step in range(1, 8):
        checkpoints.save(new_state(step=step), step, {})
        checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["3", "4", "6", "7"]
    assert sorted(path.stem for path in (tmp_path / "checksums").iterdir()) == ["3", "4", "6", "7"]
