"""Generated scenes for the demo: 1500 clips of 8 frames with four streams each, rendered on the fly."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    streams = ("rgb", "segmentation", "depth", "edges")
    return ConfigDict({"kind": "generated", "seed": 0, "num_scenes": 1500, "num_frames": 8, "streams": streams})
