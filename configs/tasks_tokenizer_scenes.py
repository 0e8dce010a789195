"""The scenes of configs/tasks_scenes.py without masks and most palettes: a tokenizer sees more of the rest."""

from ml_collections import ConfigDict

from configs import tasks_scenes


def get_config() -> ConfigDict:
    config = tasks_scenes.get_config()
    config.streams = ("rgb", "segmentation", "depth", "edges", "normals", "segmentation_41", "segmentation_70")
    return config
