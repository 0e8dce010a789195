"""Image source of images with COCO-style JSON annotations: boxes, masks and keypoints, rendered at the image's size."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, Float, UInt8

from lvm.common.errors import UserError
from lvm.data.images.sources.base import ImageSource, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import UnreadableError, decode_image
from lvm.data.images.sources.listing import hash_files
from lvm.data.images.sources.readers import check_aspect
from lvm.data.streams.codecs import Box, Boxes, Codec, Image, Palette, Pose

Annotation = Mapping[str, Any]

_IS_RENDERED: dict[str, Callable[[Annotation], bool]] = {  # by stream, in the order of a scene, after rgb
    "segmentation": lambda annotation: bool(annotation.get("segmentation")),
    "boxes": lambda annotation: bool(annotation.get("bbox")) and not annotation.get("iscrowd"),
    "pose": lambda annotation: any(annotation.get("keypoints", ())[2::3]),
}
STREAMS = tuple(_IS_RENDERED)
_REQUIRED = {"images": ("id", "file_name", "height", "width"), "annotations": (), "categories": ("id", "name")}


@dataclasses.dataclass(frozen=True)
class CocoConfig:
    """Parameters of a COCO source."""

    annotations: str = ""  # the JSON file, with `images`, `annotations` and `categories`
    images: str = ""  # the folder that its file names are relative to
    streams: tuple[str, ...] = ()  # some of `STREAMS`; by default those that the file has annotations for
    categories: tuple[str, ...] = ()  # names of the categories to render; all by default
    radius: int = 3  # of joints, in pixels of the image

    def __post_init__(self) -> None:
        if set(self.streams) - set(STREAMS) or len(set(self.streams)) < len(self.streams):
            raise UserError(f"streams: {self.streams}; expected some of {', '.join(STREAMS)}, each once")


class CocoSource(ImageSource[tuple[int, int]]):
    """An `ImageSource` of the images that a COCO-style JSON lists.

    Each image is a scene of one frame; its key and group are its file name. It has the streams that it has annotations
    for. A class has the color of its category's id if all ids are in [1, 255], else of its rank among the ids. Larger
    objects are rendered first, so that smaller ones stay visible. Boxes of crowds are not rendered, their masks are. An
    image whose aspect ratio differs from the JSON's, or with an annotation that can't be rendered, is a failure.

    Raises:
      UserError: the file is missing or malformed, a category is unknown, or there are too many.
    """

    kind = "coco"
    config_class = CocoConfig
    required = ("annotations", "images")
    scene_noun = "image"

    def load(self, index: int) -> SceneImages:
        info, size = self._scene(index)
        try:
            image = decode_image(self._root / info.key, self._preprocess)
            check_aspect(image.size, size[::-1], "its annotations")  # a smaller copy is accepted
            frame = [self._preprocess(image.pixels, image.extent)]
            frame += [self._render(stream, self._annotations[info.key], size) for stream in info.streams[1:]]
        except (UnreadableError, UserError) as error:
            return self._scene_images(info, [], [f"{info.key}: {error}"])
        return self._scene_images(info, [np.stack(frame)])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "streams": self._codecs_json(),
            "annotations": self._digest,
            "listing": hash_files(((info.key, self._root / info.key) for info, _ in self._scenes), tail_bytes=256),
        }

    def _list_scenes(self) -> Iterator[tuple[SceneInfo, tuple[int, int]]]:
        """Yields each image with its (height, width) in the JSON."""
        path, self._root = pathlib.Path(self.config.annotations), pathlib.Path(self.config.images)
        self.name = path.stem
        if not self._root.is_dir():
            raise UserError(f"images: {self._root}: no such folder; give that of the file names in {path}")
        data, content = _load(path)
        self._digest = hashlib.sha256(data).hexdigest()
        names = [category["name"] for category in content["categories"]]
        for name in self.config.categories:
            if name not in names:
                raise UserError(f"categories: {name!r} is not in {path}: {', '.join(map(str, names))}")
        selected = [c for c in content["categories"] if c["name"] in (self.config.categories or names)]
        codecs = self._make_codecs(sorted(selected, key=lambda category: category["id"]), path)
        images = self._usable_images(content["images"])
        self._annotations = self._group_by_image(content["annotations"], images)
        used = set[str]()
        for name, image in images.items():
            annotations = self._annotations[name]
            streams = ("rgb", *(s for s in STREAMS if s in codecs and any(map(_IS_RENDERED[s], annotations))))
            used.update(streams)
            yield SceneInfo(name, name, "", 1, streams), (int(image["height"]), int(image["width"]))
        self.streams = {stream: codec for stream, codec in codecs.items() if stream in used}

    def _make_codecs(self, categories: Sequence[Mapping[str, Any]], path: pathlib.Path) -> dict[str, Codec]:
        """Returns the codecs of rgb and of each requested stream; maps category ids to class ids from 1 on."""
        ids = [category["id"] for category in categories]
        fit = all(isinstance(i, int) and 1 <= i <= 255 for i in ids)
        self._class_ids = {i: i if fit else rank for rank, i in enumerate(ids, 1)}
        num_classes = max(self._class_ids.values(), default=0)
        if not 0 < num_classes <= 255:
            raise UserError(f"{path}: {len(ids)} categories; at most 255 have a color: set `categories`")
        names = [""] * num_classes
        for category in categories:
            names[self._class_ids[category["id"]] - 1] = str(category["name"])
        codecs: dict[str, Codec] = {"rgb": Image()}
        requested = self.config.streams or STREAMS
        if "segmentation" in requested:
            codecs["segmentation"] = Palette(("background", *names), background=0)
        if "boxes" in requested:
            codecs["boxes"] = Boxes(tuple(names))
        skeletons = {_skeleton(category) for category in categories if category.get("keypoints")}
        if "pose" in requested and len(skeletons) > 1:
            raise UserError(f"{path}: categories of several skeletons; set `categories`, or leave out pose")
        if "pose" in requested and skeletons:
            codecs["pose"] = Pose(*skeletons.pop(), self.config.radius)
        if missing := set(self.config.streams) - set(codecs):
            raise UserError(f"streams: {missing.pop()!r}: no category of {path} has keypoints")
        return codecs

    def _usable_images(self, images: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Returns the images by file name that have a size, a new id and file, and lie in the folder."""
        used: dict[str, Mapping[str, Any]] = {}
        ids = set()
        for image in images:
            path = pathlib.PurePosixPath(str(image["file_name"]))
            name = str(path)
            if path.is_absolute() or ".." in path.parts:
                self._skip(name, "its name leaves the folder of images")
            elif not all(isinstance(image[s], int | float) and 1 <= image[s] < math.inf for s in ("height", "width")):
                size = f"{image['width']!r}×{image['height']!r}"
                self._skip(name, f"its size is {size}; expected two positive numbers")
            elif image["id"] in ids or name in used:
                self._skip(name, f"its id {image['id']!r} or its file is that of an earlier image")
            else:
                ids.add(image["id"])
                used[name] = image
        return used

    def _group_by_image(
        self, annotations: Sequence[Annotation], images: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[Annotation]]:
        """Returns each image's annotations of the selected categories, largest first."""
        grouped: dict[str, list[Annotation]] = {name: [] for name in images}
        by_id = {image["id"]: grouped[name] for name, image in images.items()}
        for i, annotation in enumerate(annotations):
            name = f"annotation {annotation.get('id', f'at index {i}')}"
            if annotation.get("image_id") not in by_id:
                self._skip(name, f"its image {annotation.get('image_id')!r} is not among those used")
            elif annotation.get("category_id") in self._class_ids:
                by_id[annotation["image_id"]].append({"name": name, **annotation})
        for group in grouped.values():
            group.sort(key=_area, reverse=True)
        return grouped

    def _render(
        self, stream: str, annotations: Sequence[Annotation], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "R R 3"]:
        """Renders a stream of an image of (height, width) `size`. Raises UnreadableError."""
        R = self._preprocess.resolution
        ids, boxes, people = np.zeros((R, R), np.int64), [], []
        for annotation in annotations:
            class_id = self._class_ids[annotation["category_id"]]
            try:
                if not _IS_RENDERED[stream](annotation):
                    continue
                if stream == "segmentation":
                    ids[self._mask(annotation["segmentation"], size)] = class_id
                elif stream == "boxes":
                    boxes += self._box(annotation["bbox"], class_id - 1, size)
                else:
                    people.append(self._joints(annotation["keypoints"], size))
            except Exception as error:  # annotations may hold anything, and pycocotools raises anything
                raise UnreadableError(f"{annotation['name']}: can't be rendered: {error}") from error
        codec = self.streams[stream]
        if stream == "segmentation":
            return codec.render(ids)
        return codec.render(boxes if stream == "boxes" else np.stack(people), size=(R, R))

    def _mask(self, segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "R R"]:
        """Returns the mask at the image's size: polygons are transformed, then filled; RLE is resampled."""
        R = self._preprocess.resolution
        if isinstance(segmentation, list):
            polygons = (np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation)
            mapped = [self._preprocess.map_points(polygon, size).ravel().tolist() for polygon in polygons]
            rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(mapped, R, R))
            return pycocotools.mask.decode(rle).astype(bool)
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its mask is {segmentation['size']}, the image {list(size)} (height, width)")
        if isinstance(segmentation["counts"], list):
            segmentation = pycocotools.mask.frPyObjects(segmentation, *size)
        return self._preprocess.resize_labels(pycocotools.mask.decode(segmentation)).astype(bool)

    def _box(self, bbox: Sequence[int | float], class_id: int, size: tuple[int, int]) -> list[Box]:
        """Returns the box in the image; none if it was cropped away."""
        x, y, width, height = bbox
        R = self._preprocess.resolution
        corners = self._preprocess.map_points(np.array([[x, y], [x + width, y + height]]), size)
        (x0, y0), (x1, y1) = np.rint(corners).astype(int).clip(0, R).tolist()
        return [Box(class_id, x0, y0, x1, y1)] if x0 < x1 and y0 < y1 else []

    def _joints(self, keypoints: Sequence[int | float], size: tuple[int, int]) -> Float[np.ndarray, "J 2"]:
        """Returns the joints' (x, y) in the image, NaN if not labeled."""
        joints = np.array(keypoints, np.float64).reshape(-1, 3)
        points = self._preprocess.map_points(joints[:, :2] + 0.5, size)  # COCO puts pixel 0's center at 0
        return np.where(joints[:, 2:] > 0, points, np.nan)


def _load(path: pathlib.Path) -> tuple[bytes, dict[str, list[Any]]]:
    """Returns the JSON file's bytes and its content."""
    try:
        content = json.loads((data := path.read_bytes()).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"annotations: {path}: not readable as JSON: {error}") from error
    has_lists = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in _REQUIRED)
    if not has_lists or not all(isinstance(item, dict) for key in _REQUIRED for item in content[key]):
        raise UserError(f"{path}: expected an object with lists of objects {', '.join(_REQUIRED)}")
    for key, required in _REQUIRED.items():
        for item in content[key]:
            if missing := [name for name in required if name not in item]:
                raise UserError(f"{path}: one of {key} lacks {', '.join(missing)}: {str(item)[:80]}")
            if "id" in required and not isinstance(item["id"], int | str):
                raise UserError(f"{path}: one of {key} has the id {item['id']!r}; expected a number or a name")
    return data, content


def _skeleton(category: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns a category's joint names, "left" and "right" as separate words, and its limbs as 0-based pairs."""
    joints = tuple(str(name).replace("_", " ") for name in category["keypoints"])
    return joints, tuple(joint - 1 for limb in category.get("skeleton", ()) for joint in limb)


def _area(annotation: Annotation) -> float:
    """Returns the annotation's area, else its box's; 0 if malformed, which then fails when rendered."""
    bbox = annotation.get("bbox")
    try:
        return float(annotation.get("area") or (bbox[2] * bbox[3] if bbox else 0))
    except (TypeError, ValueError, IndexError):
        return 0.0
