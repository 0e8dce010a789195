"""The adversarial phase on a mesh of several devices."""

import jax
import numpy as np
import pytest

from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training.step import Step
from tests.tokenizer.test_adversary import batch, make_task


@pytest.mark.slow
def test_step_is_equal_on_data_and_fsdp():
    histories = []
    for config, count, zero1 in ((MeshConfig(), 1, False), (MeshConfig(data=2, fsdp=2), 4, True)):
        step = Step(make_task(), make_mesh(config, jax.devices()[:count]), seed=0, zero1=zero1)
        state, history = step.init(), []
        for i in range(4):
            images = {name: np.asarray(x)[step.rows] for name, x in batch(i).items()}
            state, metrics = step(state, step.shard_batch(images))
            history.append({name: float(value) for name, value in metrics.items()})
        histories.append(history)
    assert histories[0][-1]["discriminator/grad_norm"] > 0
    assert any(len(x.sharding.spec) for x in jax.tree.leaves(state["training"]) if x.ndim == 4)
    for one, four in zip(*histories, strict=True):
        assert four == pytest.approx(one, rel=2e-3, abs=1e-4)
