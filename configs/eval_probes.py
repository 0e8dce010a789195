"""Probes of the demo model's frozen features, on the held-out scenes of configs/demo_scenes.py."""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluators.probes import Probes


def get_config() -> ConfigDict:
    """All 213 held-out scenes of the demo, of whose 1704 frames 1024 are probed, 4 or 5 of each scene."""
    return to_config_dict(EvalConfig({"probes": Probes()}, source="configs/demo_scenes.py"))
