"""Scenes made from a seed: textured shapes that drift, turn and pulse over a still background.

Each scene comes with exact annotations, since whoever draws the shapes knows where they are. Nothing is read
from disk: the same (seed, index, resolution) always gives the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.shapes import CLASSES, FAR, NEAR, Scene, render, sample_scene
from lvm.data.streams.codecs import Box, Boxes, Codec, Depth, Edges, Image, Normals, Palette

CODECS: dict[str, Codec] = {
    "rgb": Image(),
    "segmentation": Palette(("background", *CLASSES), background=0),
    "depth": Depth(near=NEAR, far=FAR, unit="m"),
    "edges": Edges(),
    "normals": Normals(),
    "boxes": Boxes(CLASSES),
}


@dataclasses.dataclass(frozen=True)
class GeneratedConfig:
    """The parameters of generated scenes.

    Attributes:
      seed: scene i is a pure function of (seed, i, resolution); a longer clip begins with the shorter one.
      num_scenes: how many scenes there are.
      num_frames: frames T of every scene.
      streams: which streams every scene has, in this order; any of `CODECS`.
    """

    kind: ClassVar[str] = "generated"
    seed: int = 0
    num_scenes: int = 1500
    num_frames: int = 8
    streams: tuple[str, ...] = ("rgb", "segmentation", "depth", "edges")

    def __post_init__(self) -> None:
        for key, least in (("seed", 0), ("num_scenes", 1), ("num_frames", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)} is too small; it must be at least {least}")
        if not self.streams or len(set(self.streams)) < len(self.streams) or set(self.streams) - set(CODECS):
            raise UserError(f"streams: {self.streams}; expected some of {', '.join(CODECS)}, each once")


class GeneratedSource:
    """An `ImageSource` of generated scenes. A scene's class is that of its front shape, its group is its key.

    Args:
      preprocess: gives the resolution; scenes are drawn at it, so nothing is resized.
      **parameters: the fields of `GeneratedConfig`.

    Raises:
      UserError: for an unknown parameter, a wrong type or an impossible value.
    """

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: GeneratedConfig = from_config_dict(GeneratedConfig, parameters, "generated")
        self.name = "generated"
        self.resolution = preprocess.resolution
        self.streams: Mapping[str, Codec] = {stream: CODECS[stream] for stream in self.config.streams}
        self.stream_sets: tuple[tuple[str, ...], ...] = (self.config.streams,)
        self.classes = tuple(sorted(CLASSES))
        self.skipped: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return self.config.num_scenes

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        return self._info(index, self._sample(index))

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        scene = self._sample(index)
        maps = render(scene, self.config.num_frames, self.resolution, self.config.streams)
        images = np.stack([self._draw(stream, maps, scene) for stream in self.config.streams], axis=1)
        return SceneImages(self._info(index, scene), images)  # [T, S, R, R, 3]

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return to_json(self.config) | {"streams": list(self.config.streams)}

    def _sample(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return sample_scene(np.random.default_rng([self.config.seed, index]))

    def _info(self, index: int, scene: Scene) -> SceneInfo:
        key = f"generated-{self.config.seed}-{index:06d}"
        front = CLASSES[scene.shapes[-1].class_id]
        return SceneInfo(key, key, front, self.config.num_frames, self.config.streams)

    def _draw(self, stream: str, maps: dict[str, np.ndarray], scene: Scene) -> np.ndarray:
        if stream == "boxes":
            size = (self.resolution, self.resolution)
            frames = [CODECS["boxes"].render(_visible_boxes(front, scene), size) for front in maps["front"]]
            return np.stack(frames)  # [T, R, R, 3]
        annotation = maps[stream]
        T, R = annotation.shape[:2]
        # The codecs look at one pixel at a time, so that all frames can be drawn as one tall image.
        tall = CODECS[stream].render(annotation.reshape(T * R, R, *annotation.shape[3:]))
        return tall.reshape(T, R, R, 3)  # [T, R, R, 3]


def _visible_boxes(front: np.ndarray, scene: Scene) -> list[Box]:
    """The box around what is seen of each shape, from back to front; `front` [R, R] numbers shapes from 1."""
    boxes = []
    for number, shape in enumerate(scene.shapes, start=1):
        seen = front == number
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        if len(rows):
            x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            boxes.append(Box(shape.class_id, int(x0), int(y0), int(x1), int(y1)))
    return boxes
