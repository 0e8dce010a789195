"""A run goes on with fewer devices: more micro-batches, the same batches, the same losses up to rounding."""

import shutil

import jax
import numpy as np
import optax
import pytest

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import metrics
from lvm.training.loop import Loop, LoopConfig
from lvm.training.next_token import NextTokenTask, ObjectiveConfig
from lvm.training.step import Step
from lvm.training.workdir import Workdir
from tests.small_step import CONFIG, B, batch


@pytest.mark.parametrize(
    ("batch_size", "devices", "rows", "steps"),
    [(512, 256, 2, 1), (512, 128, 2, 2), (448, 64, 3, 7), (448, 56, 3, 4), (512, 64, 9, 1), (4, 8, 2, 1)],
)
def test_rows_per_device_sets_micro_batches(batch_size, devices, rows, steps):
    objective = ObjectiveConfig(rows_per_device=rows).for_mesh(batch_size, devices // 4, 4)
    assert objective == ObjectiveConfig(accumulate_steps=steps)


def test_rows_per_device_excludes_accumulate_steps():
    with pytest.raises(UserError, match="rows_per_device=2 and accumulate_steps=4; set one of them"):
        ObjectiveConfig(rows_per_device=2, accumulate_steps=4)


def train(path, num_devices, total):
    """Trains with at most 2 rows a device; returns the step's number of micro-batches and the batches read."""
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:num_devices])
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(0).items()}
    schedule = optax.constant_schedule(0.1)
    tx = optax.sgd(schedule, momentum=0.9)  # a state like AdamW's, compiled in half of the time
    objective = ObjectiveConfig(logits_chunk=4, rows_per_device=2).for_mesh(B, mesh.shape["data"], mesh.shape["fsdp"])
    task = NextTokenTask(CONFIG, spec, ["cats", "dogs"], tx, schedule, mesh, objective)
    read = {}

    def read_rows(step, rows):
        read[step] = {name: x[rows] for name, x in batch(step).items()}
        return read[step]

    config = LoopConfig(total_steps=total, log_every=1, evaluate_every=0, picture_every=0, checkpoint_every=5)
    workdir = Workdir(path, "lvm", {"config": {}})
    Loop(Step(task, mesh, seed=3), read_rows, config, workdir).run()
    workdir._lock.close()
    return objective.accumulate_steps, read


def losses(path):
    return [line["loss"] for line in metrics.read_metrics(path)]


def test_run_resumes_on_half_of_its_devices(tmp_path):
    whole_steps, whole = train(tmp_path / "whole", 4, 10)
    shutil.copytree(tmp_path / "whole", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "checkpoints" / "10")
    steps, resumed = train(tmp_path / "fewer", 2, 10)
    assert (whole_steps, steps) == (1, 2)
    assert sorted(resumed) == list(range(5, 10))
    for index, arrays in resumed.items():
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, whole[index][name])
    np.testing.assert_allclose(losses(tmp_path / "fewer"), losses(tmp_path / "whole"), rtol=1e-5)
    assert losses(tmp_path / "fewer")[:5] == losses(tmp_path / "whole")[:5]
