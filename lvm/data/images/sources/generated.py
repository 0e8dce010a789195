"""Image source of scenes rendered from a seed: textured shapes that drift, turn and pulse over a still background.

Annotations are exact, since the renderer knows where the shapes are. Nothing is read from disk: equal
(seed, index, resolution) give equal images.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.scene import SceneImages, SceneInfo
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
    """Parameters of generated scenes."""

    seed: int = 0  # scene i is a pure function of (seed, i, resolution); a longer clip begins with the shorter one
    num_scenes: int = 1500
    num_frames: int = 8  # of every scene
    streams: tuple[str, ...] = ("rgb", "segmentation", "depth", "edges")  # any of `CODECS`, in this order

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")
        check_positive(self, "num_scenes", "num_frames")
        if not self.streams or len(set(self.streams)) < len(self.streams) or set(self.streams) - set(CODECS):
            raise UserError(f"streams: {self.streams}; expected some of {', '.join(CODECS)}, each once")


class GeneratedSource(ImageSource[None]):
    """An `ImageSource` of generated scenes, rendered at the resolution of `preprocess`.

    A scene's class is that of its front shape; its group is its key.
    """

    kind = "generated"
    config_class = GeneratedConfig
    required = ()
    name = "generated"
    classes = tuple(sorted(CLASSES))

    def __len__(self) -> int:
        return self.config.num_scenes

    def info(self, index: int) -> SceneInfo:
        return self._info(index, self._sample(index))

    def load(self, index: int) -> SceneImages:
        scene = self._sample(index)
        R = self._preprocess.resolution
        maps = render(scene, self.config.num_frames, R, self.config.streams)
        images = np.stack([self._render(stream, maps, scene, R) for stream in self.config.streams], axis=1)
        return SceneImages(self._info(index, scene), images)

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        scene, side = self._sample(index), preprocess.render_side
        maps = render(scene, frame + 1, side, (stream,))
        image = self._render(stream, {name: x[frame:] for name, x in maps.items()}, scene, side)[0]
        return preprocess(image) if stream == "rgb" else preprocess.resize_labels(image)

    def describe(self) -> dict[str, Any]:
        return super().describe() | to_json(self.config) | {"streams": list(self.config.streams)}

    def _list_scenes(self) -> list[tuple[SceneInfo, None]]:
        self.streams = {stream: CODECS[stream] for stream in self.config.streams}
        self.stream_sets = (self.config.streams,)
        return []  # computed from the seed

    def _sample(self, index: int) -> Scene:
        self._check_index(index)
        return sample_scene(np.random.default_rng([self.config.seed, index]))

    def _info(self, index: int, scene: Scene) -> SceneInfo:
        key = f"generated-{self.config.seed}-{index:06d}"
        class_name = CLASSES[scene.shapes[-1].class_id]
        return SceneInfo(key, key, class_name, self.config.num_frames, self.config.streams)

    def _render(self, stream: str, maps: dict[str, np.ndarray], scene: Scene, R: int) -> UInt8[np.ndarray, "T R R 3"]:
        codec = CODECS[stream]
        if stream == "boxes":
            return np.stack([codec.render(_visible_boxes(front, scene), (R, R)) for front in maps["front"]])
        annotation = maps[stream]  # [T, R, R, ...]
        # These codecs work pixel by pixel, so all frames are rendered as one tall image.
        return codec.render(annotation.reshape(-1, *annotation.shape[2:])).reshape(-1, R, R, 3)


def _visible_boxes(front: UInt8[np.ndarray, "R R"], scene: Scene) -> list[Box]:
    """Returns the box around the visible part of each shape, back to front; `front` numbers shapes from 1."""
    boxes = []
    for number, shape in enumerate(scene.shapes, start=1):
        visible = front == number
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        if len(rows):
            x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            boxes.append(Box(shape.class_id, int(x0), int(y0), int(x1), int(y1)))
    return boxes
