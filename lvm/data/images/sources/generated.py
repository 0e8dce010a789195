"""Image source of scenes rendered from a seed: textured shapes that drift, turn and pulse over a still background.

Annotations are exact, since the renderer knows where the shapes are. Nothing is read from disk: equal
(seed, index, resolution) give equal images.
"""

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.images.sources.shapes import CLASSES, FAR, MAX_SHAPES, NEAR, SHAPES, TEXTURES, Scene, render, sample_scene
from lvm.data.streams.codecs import Box, Boxes, Codec, Depth, Edges, Image, Normals, Palette

CODECS: dict[str, Codec] = {
    "rgb": Image(),
    "segmentation": Palette(("background", *CLASSES), background=0),
    "depth": Depth(near=NEAR, far=FAR, unit="m"),
    "edges": Edges(),
    "normals": Normals(),
    "boxes": Boxes(CLASSES),
    "mask": Palette(("background", "object"), background=0),
}
ORDERS = tuple(itertools.permutations(CLASSES))  # of the colors of segmentation_K; the first is that of segmentation


@dataclasses.dataclass(frozen=True)
class GeneratedConfig:
    """Parameters of generated scenes."""

    # Scene i is a function of (seed, i, shapes, class_hues, textures, resolution); a clip begins with any shorter one.
    seed: int = 0
    num_scenes: int = 1500
    num_frames: int = 8  # of every scene
    # Some of `CODECS`, in this order (mask: the shapes of the class that the front shape has);
    # segmentation_K, K = 1 … 119, with the colors of the classes in another order.
    streams: tuple[str, ...] = ("rgb", "segmentation", "depth", "edges")
    shapes: tuple[int, int] = SHAPES  # the fewest and the most in a scene; fewer are larger
    class_hues: bool = False  # hues of shapes are near those of their classes; otherwise only outlines tell a class
    textures: tuple[str, ...] = TEXTURES  # of surfaces, some of these; half are plain if other textures are given, too

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")
        check_positive(self, "num_scenes", "num_frames")
        known = all(codec_of(stream) is not None for stream in self.streams)
        if not known or not self.streams or len(set(self.streams)) < len(self.streams):
            expected = f"{', '.join(CODECS)}, segmentation_1 to segmentation_{len(ORDERS) - 1}"
            raise UserError(f"streams: {self.streams}; expected some of {expected}, each once")
        if len(self.shapes) != 2 or not 1 <= self.shapes[0] <= self.shapes[1] <= MAX_SHAPES:
            expected = f"the fewest and the most shapes of a scene, from 1 to {MAX_SHAPES}"
            raise UserError(f"shapes: {self.shapes}; expected {expected}")
        if not self.textures or not set(self.textures) <= set(TEXTURES) or len(set(self.textures)) < len(self.textures):
            raise UserError(f"textures: {self.textures}; expected some of {', '.join(TEXTURES)}, each once")


def codec_of(stream: str) -> Codec | None:
    """The codec of a stream, None for an unknown name."""
    recolored = re.fullmatch("segmentation_([1-9][0-9]*)", stream)
    if recolored and int(recolored[1]) < len(ORDERS):
        return Palette(("background", *ORDERS[int(recolored[1])]), background=0)
    return CODECS.get(stream)


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
        maps = render(scene, self.config.num_frames, R, [_map_of(stream) for stream in self.config.streams])
        images = np.stack([self._render(stream, maps, scene, R) for stream in self.config.streams], axis=1)
        return SceneImages(self._info(index, scene), images)

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        scene, side = self._sample(index), preprocess.render_side
        maps = render(scene, frame + 1, side, (_map_of(stream),))
        image = self._render(stream, {name: x[frame:] for name, x in maps.items()}, scene, side)[0]
        return preprocess(image) if stream == "rgb" else preprocess.resize_labels(image)

    def describe(self) -> dict[str, Any]:
        fields = to_json(self.config) | {"streams": list(self.config.streams), "shapes": list(self.config.shapes)}
        fields["textures"] = list(self.config.textures)
        for name, default in (("shapes", SHAPES), ("class_hues", False), ("textures", TEXTURES)):
            if getattr(self.config, name) == default:  # as stores of earlier versions describe their scenes
                del fields[name]
        return super().describe() | fields

    def _list_scenes(self) -> list[tuple[SceneInfo, None]]:
        self.streams = {s: codec for s in self.config.streams if (codec := codec_of(s)) is not None}
        self.stream_sets = (self.config.streams,)
        return []  # computed from the seed

    def _sample(self, index: int) -> Scene:
        self._check_index(index)
        rng = np.random.default_rng([self.config.seed, index])
        return sample_scene(rng, self.config.shapes, self.config.class_hues, self.config.textures)

    def _info(self, index: int, scene: Scene) -> SceneInfo:
        key = f"generated-{self.config.seed}-{index:06d}"
        class_name = CLASSES[scene.shapes[-1].class_id]
        return SceneInfo(key, key, class_name, self.config.num_frames, self.config.streams)

    def _render(self, stream: str, maps: dict[str, np.ndarray], scene: Scene, R: int) -> UInt8[np.ndarray, "T R R 3"]:
        codec = self.streams[stream]
        if stream == "boxes":
            return np.stack([codec.render(_visible_boxes(front, scene), (R, R)) for front in maps["front"]])
        annotation = maps[_map_of(stream)]  # [T, R, R, ...]
        if stream == "mask":
            annotation = (annotation == 1 + scene.shapes[-1].class_id).astype(np.uint8)
        elif isinstance(codec, Palette):
            ids = [codec.names.index(name) for name in ("background", *CLASSES)]
            annotation = np.array(ids, np.uint8)[annotation]
        # These codecs work pixel by pixel, so all frames are rendered as one tall image.
        return codec.render(annotation.reshape(-1, *annotation.shape[2:])).reshape(-1, R, R, 3)


def _map_of(stream: str) -> str:
    """The rendered map that a stream shows."""
    return "segmentation" if isinstance(codec_of(stream), Palette) else stream


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
