"""The demo's transformer over sentences of 4 images of 16 codes."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import demo_lvm


def get_config() -> ConfigDict:
    config = demo_lvm.get_config()
    config.model.update({"hidden_size": 32, "mlp_size": 48, "num_layers": 2, "num_heads": 2, "context": 98})
    config.data.components.video.recipe.frames = 4
    for name in ("segmentation", "depth", "edges"):
        config.data.components[name].recipe.shots = 3
    config.data.heldout_fraction = 0.25
    config.optimizer.warmup_steps = 5
    config.loop.update({"total_steps": 60, "log_every": 10, "evaluate_every": 30, "picture_every": 30})
    config.loop.checkpoint_every = 20
    return config
