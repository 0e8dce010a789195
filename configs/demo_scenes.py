"""Generated scenes for the demo: 1500 clips of 8 frames with four streams each, rendered on the fly."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Hues of shapes are near their class's: by outlines alone, the demo's model doesn't tell classes (docs/log.md)."""
    streams = ("rgb", "segmentation", "depth", "edges")
    scenes = {"seed": 0, "num_scenes": 1500, "num_frames": 8, "class_hues": True}
    return ConfigDict({"kind": "generated", **scenes, "streams": streams})
