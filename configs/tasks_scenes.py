"""Generated scenes of configs/tasks_lvm.py: 2000 clips of 15 frames, a shape or two in each."""

from ml_collections import ConfigDict

# Ten orders of the colors of the five classes, in which a class has each color once to three times.
PALETTES = tuple(f"segmentation_{order}" for order in (9, 20, 36, 41, 52, 70, 73, 78, 97, 105))


def get_config() -> ConfigDict:
    """Fewer and larger shapes than the demo's, with hues of their class: few codes tell their classes apart.

    With hues of any class, a model that was trained for 49 minutes finds shapes, and their classes stay at chance.
    Surfaces are plain: with half of them textured, continued videos had less SSIM than their last frame (docs/log.md).
    """
    streams = ("rgb", "segmentation", "depth", "edges", "normals", "mask", *PALETTES)
    scenes = {"seed": 0, "num_scenes": 2000, "num_frames": 15, "shapes": (1, 2)}
    looks = {"class_hues": True, "textures": ("plain",)}
    return ConfigDict({"kind": "generated", **scenes, **looks, "streams": streams})
