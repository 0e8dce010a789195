"""The scenes of configs/tasks_scenes.py without masks and most palettes: a tokenizer sees more of the rest."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    streams = ("rgb", "segmentation", "depth", "edges", "normals", "segmentation_41", "segmentation_70")
    scenes = {"seed": 0, "num_scenes": 2000, "num_frames": 15, "shapes": (1, 2), "class_hues": True}
    return ConfigDict({"kind": "generated", **scenes, "streams": streams})
