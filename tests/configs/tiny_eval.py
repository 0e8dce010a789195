"""The demo's evaluation with few questions."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import eval_demo


def get_config() -> ConfigDict:
    config = eval_demo.get_config()
    config.update({"source": "tests/configs/tiny_scenes.py", "num_sentences": 8, "num_queries": 8})
    return config
