"""Base of configs/sweep_demo.py's runs: the demo's mixture, without pictures, at the learning rate of width 32."""

from ml_collections import ConfigDict

from configs import demo_lvm


def get_config() -> ConfigDict:
    config = demo_lvm.get_config()
    config.data.heldout_fraction = 0.15
    config.heldout_batches = 32
    config.model.parametrization.update({"name": "mup", "base_width": 32})
    config.optimizer.learning_rate = 8e-3  # 982 steps of width 32: 3.245 at 2.5e-3, 2.927 at 8e-3, 2.983 at 1.6e-2
    config.loop.update({"log_every": 50, "evaluate_every": 0, "picture_every": 0, "checkpoint_every": 200, "keep": 1})
    return config
