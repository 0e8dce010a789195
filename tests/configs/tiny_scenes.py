"""A few generated scenes for tests that train."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    streams = ("rgb", "segmentation", "depth", "edges")
    return ConfigDict({"kind": "generated", "seed": 1, "num_scenes": 40, "num_frames": 4, "streams": streams})
