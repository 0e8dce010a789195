"""Local checkpoints: bit-exact restore, agreement, damage, other runs and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvm.common import progress
from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import local_checkpoint
from lvm.training.checkpoint import latest_step
from lvm.training.local_checkpoint import LocalCheckpointConfig, LocalCheckpoints
from lvm.training.workdir import RUN_ID, Workdir
from tests.lvm.training.test_loop import bits, broken_at, release, timeless, train

META = {"productive_seconds": 3.5, "losses": [1.5, 1.25]}


def abstract_state(fsdp=4):
    mesh = make_mesh(MeshConfig(data=8 // fsdp, fsdp=fsdp))
    shapes = {
        "step": ((), jnp.int32, ()),
        "params": ((8, 6), jnp.bfloat16, ("fsdp",)),
        "training": ((4, 3), jnp.float32, ()),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for name, (shape, dtype, spec) in shapes.items()
    }


def new_state(step, abstract):
    random = np.random.default_rng(step)
    values = {name: random.normal(size=x.shape).astype(x.dtype) for name, x in abstract.items()}
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), values | {"step": np.int32(step)}, abstract)


@pytest.fixture
def open_local(tmp_path):
    """(workdir, fsdp, keep) → local checkpoints in one folder."""

    def make(workdir="run", fsdp=4, keep=2):
        (tmp_path / workdir).mkdir(exist_ok=True)
        config = LocalCheckpointConfig(str(tmp_path / "local"), every=5, keep=keep)
        return LocalCheckpoints(config, tmp_path / workdir, abstract_state(fsdp))

    return make


@pytest.fixture
def saved(open_local):
    """Steps 5 and 10 of a run; step 0 was overwritten."""
    local = open_local()
    for step in (0, 5, 10):
        local.save(new_state(step, abstract_state()), step, META)
    local.wait()
    return local


def test_local_restore_returns_saved_bits_and_meta(saved, open_local, tmp_path):
    local = open_local()
    assert local.latest_intact_step(100) == 10
    state, meta = local.restore(10)
    assert meta == META
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(new_state(10, abstract_state())), strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert progress.read(tmp_path / "run") == 10
    assert saved._steps() == [5, 10]  # `keep`


def test_local_steps_end_before_the_last_of_the_run(saved):
    assert saved.latest_intact_step(before=10) == 5
    assert saved.latest_intact_step(before=5) == 0


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "record", "meta"])
def test_local_damage_is_named_and_older_step_restored(saved, caplog, damage):
    path = saved._folder / "10" / "shards.safetensors"
    if damage == "flip":
        flip_last_bit(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "record":
        path = saved._record(10)
        path.write_bytes(b"\0\0")
    else:
        path = saved._folder / "10" / "meta.json"
        path.unlink()
    assert saved.latest_intact_step(100) == 5
    assert str(path) in caplog.text


def test_local_step_is_restored_only_where_all_have_it(saved, monkeypatch):
    def gather(values, other=(0, 5)):
        if values.ndim:  # another process has steps 0 and 5
            return np.stack([values, np.resize(np.array(other, np.int32), values.shape)])
        return np.stack([values, np.array(False)])

    monkeypatch.setattr(local_checkpoint.distributed, "gather", gather)
    assert saved.latest_intact_step(100) == 5
    # On another process everything is damaged.
    monkeypatch.setattr(local_checkpoint.distributed, "gather", lambda x: np.stack([x, x if x.ndim else ~x]))
    assert saved.latest_intact_step(100) == 0


def test_local_steps_of_other_runs_and_meshes_are_ignored(saved, open_local, caplog):
    assert open_local(fsdp=8).latest_intact_step(100) == 0
    assert "of another mesh or model" in caplog.text
    caplog.set_level("INFO")
    assert open_local("another").latest_intact_step(100) == 0
    assert "ignoring local checkpoints of other runs: 1" in caplog.text
    assert open_local().latest_intact_step(100) == 10


def test_local_delete_after_and_remove(saved, tmp_path):
    saved.delete_after(5)
    assert saved.latest_intact_step(100) == 5
    other = saved._folder.parent / "p1"
    other.mkdir()
    saved.remove()
    assert list((tmp_path / "local").glob("*/*")) == [other]
    other.rmdir()
    saved.remove()
    assert list((tmp_path / "local").iterdir()) == []


def test_local_save_on_a_full_disk_is_a_warning(saved, monkeypatch, caplog):
    def save_file(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_checkpoint.safetensors.numpy, "save_file", save_file)
    saved.save(new_state(15, abstract_state()), 15, META)
    saved.wait()
    assert "step 15 is not saved locally" in caplog.text
    assert saved.latest_intact_step(100) == 10


def test_loop_resumes_from_local_checkpoint(tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"total": 8, "checkpoint_every": 5}
    whole = train(tmp_path / "whole", **options)
    options["local_checkpoint"] = LocalCheckpointConfig(str(tmp_path / "local"), every=1)
    for broken in (4, 7):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            train(tmp_path / "cut", read=broken_at(broken), **options)
        release(tmp_path / "cut")
    assert bits(train(tmp_path / "cut", **options)) == bits(whole)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert [line.rpartition(" ")[2] for line in caplog.messages if "resuming from step" in line] == ["4", "7"]
    assert latest_step(tmp_path / "cut") == 8
    assert not any((tmp_path / "local").iterdir())


@pytest.mark.parametrize("persistent_every", [4, 8])
def test_loop_passes_over_a_damaged_newest_checkpoint(tmp_path, caplog, persistent_every):
    # Local steps 3 and 6; persistent ones 4 and 8, or 8 alone, which is damaged.
    caplog.set_level("INFO")
    options = {"total": 10, "checkpoint_every": persistent_every}
    whole = train(tmp_path / "whole", **options)
    options["local_checkpoint"] = LocalCheckpointConfig(str(tmp_path / "local"), every=3)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(tmp_path / "cut", read=broken_at(8), **options)
    release(tmp_path / "cut")
    parameters = (tmp_path / "cut" / "checkpoints" / "8" / "params" / "d").iterdir()
    flip_last_bit(max(parameters, key=lambda path: path.stat().st_size))
    assert bits(train(tmp_path / "cut", **options)) == bits(whole)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert "going back to step 6" in caplog.text
    assert (tmp_path / "cut" / "damaged-checkpoints" / "8-0").is_dir()


def test_changed_config_before_any_checkpoint_is_another_run(tmp_path):
    ids = []
    for seed in (0, 0, 1):
        workdir = Workdir(tmp_path / "run", "lvm", {"config": {"seed": seed}})
        LocalCheckpoints(LocalCheckpointConfig(str(tmp_path / "local")), workdir.path, abstract_state())
        ids.append((workdir.path / RUN_ID).read_text())
        release(workdir.path)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("values", [{"every": 0}, {"keep": 1}, {"folder": "gs://bucket/local"}])
def test_local_checkpoint_config_rejects(values):
    with pytest.raises(UserError, match=next(iter(values))):
        LocalCheckpointConfig(**values)
