"""The demo's evaluation with few questions."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import eval_demo


def get_config() -> ConfigDict:
    config = eval_demo.get_config()
    config.source = "tests/configs/tiny_scenes.py"
    for evaluation in config.evaluations.values():
        evaluation.update({key: 8 for key in ("num_sentences", "num_queries") if key in evaluation})
    return config
