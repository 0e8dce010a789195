"""Tokenizer of the demo at 32×32: 4×4 codes of a codebook of 64."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import demo_tokenizer


def get_config() -> ConfigDict:
    config = demo_tokenizer.get_config()
    config.model.update({"resolution": 32, "patch_size": 8, "channels": 16, "channel_multipliers": (1,)})
    config.model.update({"encoder_blocks": 1, "decoder_blocks": 1, "middle_blocks": 0, "codebook_size": 64})
    config.model.update({"codebook_dim": 4, "norm_groups": 4})
    config.preprocess.resolution = 32
    config.batch_size = 8
    config.loss.autoencoder_steps = 8
    config.data.update({"source": "tests/configs/tiny_scenes.py", "heldout_fraction": 0.25, "max_scenes": 0})
    config.optimizer.warmup_steps = 5
    config.loop.update({"total_steps": 60, "log_every": 10, "evaluate_every": 30, "picture_every": 30})
    config.loop.checkpoint_every = 20
    return config
