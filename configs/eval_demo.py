"""The demo's evaluation, on the held-out scenes of configs/demo_scenes.py."""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig


def get_config() -> ConfigDict:
    return to_config_dict(EvalConfig(source="configs/demo_scenes.py", num_queries=192, num_sentences=128))
