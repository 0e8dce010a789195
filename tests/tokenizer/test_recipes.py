"""Configs of tokenizers at reduced size: their batches are read, and their steps compiled and run."""

import jax
import numpy as np
import pytest

from lvm.common.config import from_config_dict
from lvm.data.images.sources import open_source
from lvm.hardware.sharding import make_mesh
from lvm.training.step import Step
from tests.commands import ROOT
from tests.test_configs import load_config
from tokenizer.config import TokenizerConfig, build_task
from tokenizer.images import TrainingImages

SIDE = 32


def reduced(config):
    """A config at 32×32 with narrow stages, few codes and its discriminator from the first step."""
    values = load_config(ROOT / "configs" / f"{config}.py")
    values.model.update({"resolution": SIDE, "channels": 32, "codebook_size": 32, "codebook_dim": 8})
    values.model.update({"encoder_blocks": 1, "decoder_blocks": 1, "middle_blocks": 1})
    values.preprocess.resolution = SIDE
    values.batch_size = 2
    values.data.update({"source": "tests/configs/tiny_scenes.py", "heldout_fraction": 0.25})
    values.data.rgb_share = 0.5  # the scenes have other streams, too
    values.adversarial.start_step = 0
    values.loss.autoencoder_steps = 0
    return from_config_dict(TokenizerConfig, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("tokenizer_*.py")))
def test_config_trains_at_reduced_size(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = reduced(name)
    source = open_source(config.data.source, config.preprocess)
    step = Step(build_task(config, config.loop.total_steps), make_mesh(config.mesh, jax.devices()[:1]), config.seed)
    with TrainingImages(source, config.data, config.preprocess, config.batch_size, config.seed, tmp_path) as images:
        state = step.init()
        for i in range(2):
            state, metrics = step(state, step.shard_batch(images.read(i, np.arange(config.batch_size))))
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    assert int(metrics["skipped_steps"]) == 0
    assert float(metrics["discriminator/grad_norm"]) > 0
    assert f"loss/{config.loss.perceptual.kind}" in metrics
