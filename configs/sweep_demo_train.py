"""Base of configs/sweep_demo.py's runs: the demo's mixture in small batches, without pictures."""

from ml_collections import ConfigDict

from configs import demo_lvm


def get_config() -> ConfigDict:
    config = demo_lvm.get_config()
    config.data.heldout_fraction = 0.15
    config.heldout_batches = 32
    config.loop.update({"log_every": 50, "evaluate_every": 0, "picture_every": 0, "checkpoint_every": 200, "keep": 1})
    return config
