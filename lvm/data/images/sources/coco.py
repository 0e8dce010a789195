"""Scenes from images with a COCO-style JSON: its boxes, masks and key points are drawn at the size of the image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pycocotools.mask

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import UnreadableError, decode_for
from lvm.data.images.sources.listing import check_index, hash_files
from lvm.data.images.sources.readers import same_aspect
from lvm.data.streams.codecs import Box, Boxes, Codec, Image, Palette, Pose

STREAMS = ("segmentation", "boxes", "pose")  # beside rgb, in the order in a scene

Annotation = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CocoConfig:
    """The parameters of images with COCO-style annotations.

    Attributes:
      annotations: the JSON file, with `images`, `annotations` and `categories`.
      images: the folder that its file names lie in.
      streams: which of `STREAMS` to draw; by default those that the file has annotations for.
      categories: names of the categories to draw; all by default.
      radius: of joints, in pixels of the image.
    """

    kind: ClassVar[str] = "coco"
    annotations: str = ""
    images: str = ""
    streams: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    radius: int = 3

    def __post_init__(self) -> None:
        if not self.annotations or not self.images:
            raise UserError(
                "annotations and images: one is missing; expected a JSON file and the folder of its images"
            )
        if set(self.streams) - set(STREAMS) or len(set(self.streams)) < len(self.streams):
            raise UserError(
                f"streams: {self.streams}; expected some of {', '.join(STREAMS)}, each once (rgb is there)"
            )


class CocoSource:
    """An `ImageSource` of the images that a COCO-style JSON lists.

    Each is a scene of one frame; its key and its group are its file name. It has the streams that there are
    annotations of it for. Classes have the colour of their category's id, if all ids lie in [1, 255], else of their
    place in the order of ids. Larger things are drawn first, so that smaller ones stay in sight. Boxes of crowds are
    not drawn, their masks are. An image of another shape than the JSON's, or with an annotation that can't be drawn,
    is a failure.

    Args:
      preprocess: how pictures become images; annotations are moved with them, then drawn.
      **parameters: the fields of `CocoConfig`.

    Raises:
      UserError: the file is missing or not of this form, a category is unknown, or there are too many.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: CocoConfig = from_config_dict(CocoConfig, parameters, "coco")
        self._preprocess, self._root = preprocess, pathlib.Path(self.config.images)
        path = pathlib.Path(self.config.annotations)
        if not self._root.is_dir():
            raise UserError(
                f"images: {self._root}: no such folder; expected that of the file names in {path}"
            )
        content = _read(path)
        skipped: list[Failure] = []
        categories = _categories(content["categories"], self.config.categories, path)
        self.streams: Mapping[str, Codec] = _codecs(categories, self.config, path)
        self._ids = _numbered(categories)
        self._images = _unique(content["images"], skipped)
        self._annotations = self._by_image(content["annotations"], skipped)
        self._infos = [self._list(image) for image in self._images]
        if not self._infos:
            first = f" ({skipped[0].key}: {skipped[0].reason})" if skipped else ""
            raise UserError(f"{path}: lists no image that can be used{first}")
        used = {stream for info in self._infos for stream in info.streams}
        self.streams = {stream: codec for stream, codec in self.streams.items() if stream in used}
        self.stream_sets: tuple[tuple[str, ...], ...] = tuple(sorted({info.streams for info in self._infos}))
        self.name = path.stem
        self.skipped = tuple(skipped)
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        check_index(index, len(self))
        return self._infos[index]

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        info = self.info(index)
        image = self._images[index]
        try:
            picture = decode_for(self._root / info.key, self._preprocess)
            size = (int(image["height"]), int(image["width"]))
            if not same_aspect(picture.size, size[::-1]):  # a smaller copy will do
                (w, h), (height, width) = picture.size, size
                raise UnreadableError(f"{w}×{h} is of another shape than its annotations, {width}×{height}")
            drawn = [self._preprocess(picture.pixels, picture.extent)]
            drawn += [self._draw(stream, self._annotations[image["id"]], size) for stream in info.streams[1:]]
        except (UnreadableError, UserError) as error:
            R = self._preprocess.resolution
            empty = np.empty((0, len(info.streams), R, R, 3), np.uint8)
            failure = Failure(info.key, f"{info.key}: {error}")
            return SceneImages(dataclasses.replace(info, num_frames=0), empty, (failure,))
        return SceneImages(info, np.stack(drawn)[None])  # [1, S, R, R, 3]

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {
            "kind": self.config.kind,
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
            "num_scenes": len(self),
            "annotations": self._digest,
            "listing": hash_files(self._root, (info.key for info in self._infos), most=256),
        }

    def _by_image(
        self, annotations: Sequence[Annotation], skipped: list[Failure]
    ) -> dict[Any, list[Annotation]]:
        """The annotations of each image, the largest first; those of categories that aren't wanted are left out."""
        grouped: dict[Any, list[Annotation]] = {image["id"]: [] for image in self._images}
        for number, annotation in enumerate(annotations):
            name = f"annotation {annotation.get('id', f'at place {number}')}"
            if annotation.get("image_id") not in grouped:
                skipped.append(
                    Failure(name, f"its image {annotation.get('image_id')!r} is not among those used")
                )
            elif annotation.get("category_id") in self._ids:
                grouped[annotation["image_id"]].append({"name": name, **annotation})
        for mine in grouped.values():
            mine.sort(key=_area, reverse=True)
        return grouped

    def _list(self, image: Mapping[str, Any]) -> SceneInfo:
        mine = self._annotations[image["id"]]
        has = {
            "segmentation": any(annotation.get("segmentation") for annotation in mine),
            "boxes": any(_is_box(annotation) for annotation in mine),
            "pose": any(_is_person(annotation) for annotation in mine),
        }
        streams = tuple(stream for stream in STREAMS if stream in self.streams and has[stream])
        return SceneInfo(image["file_name"], image["file_name"], "", 1, ("rgb", *streams))

    def _draw(self, stream: str, annotations: Sequence[Annotation], size: tuple[int, int]) -> np.ndarray:
        """A stream of one image, uint8 [R, R, 3]; `size` is the picture's (height, width). Raises UnreadableError."""
        R = self._preprocess.resolution
        ids, boxes, people = np.zeros((R, R), np.int64), [], []
        for annotation in annotations:
            class_id = self._ids[annotation["category_id"]]
            try:
                if stream == "segmentation" and annotation.get("segmentation"):
                    ids[self._mask(annotation["segmentation"], size)] = class_id
                elif stream == "boxes" and _is_box(annotation):
                    boxes += self._box(annotation["bbox"], class_id - 1, size)
                elif stream == "pose" and _is_person(annotation):
                    people.append(self._joints(annotation["keypoints"], size))
            except Exception as error:  # the file may hold anything, and pycocotools raises anything
                raise UnreadableError(f"{annotation['name']}: can't be drawn: {error}") from error
        codec = self.streams[stream]
        if stream == "segmentation":
            return codec.render(ids)
        return codec.render(boxes if stream == "boxes" else np.stack(people), size=(R, R))

    def _mask(self, segmentation: Any, size: tuple[int, int]) -> np.ndarray:
        """Which pixels of the image a mask covers, bool [R, R]: polygons are moved, then filled; RLE is resampled."""
        R = self._preprocess.resolution
        if isinstance(segmentation, list):
            parts = [np.array(part, np.float64).reshape(-1, 2) for part in segmentation]
            moved = [self._preprocess.map_points(part, size).ravel().tolist() for part in parts]
            return pycocotools.mask.decode(_merged(moved, R, R)).astype(bool)
        if tuple(segmentation["size"]) != size:
            raise ValueError(
                f"its mask is of {segmentation['size']}, the image of {list(size)} (height, width)"
            )
        encoded = segmentation
        if isinstance(segmentation["counts"], list):
            encoded = pycocotools.mask.frPyObjects(segmentation, *size)
        return self._preprocess.resize_labels(pycocotools.mask.decode(encoded)).astype(bool)

    def _box(self, bbox: Sequence[float], class_id: int, size: tuple[int, int]) -> list[Box]:
        """The box in the image; none where it was cropped away."""
        x, y, width, height = bbox
        R = self._preprocess.resolution
        corners = self._preprocess.map_points(np.array([[x, y], [x + width, y + height]]), size)
        (x0, y0), (x1, y1) = np.rint(corners).astype(int).clip(0, R).tolist()
        return [Box(class_id, x0, y0, x1, y1)] if x0 < x1 and y0 < y1 else []

    def _joints(self, keypoints: Sequence[float], size: tuple[int, int]) -> np.ndarray:
        """Places [J, 2] in the image, NaN for what is not labelled."""
        joints = np.array(keypoints, np.float64).reshape(-1, 3)
        # COCO counts pixels: the middle of pixel 0 is at 0.5.
        places = self._preprocess.map_points(joints[:, :2] + 0.5, size)
        return np.where(joints[:, 2:] > 0, places, np.nan)


def _merged(polygons: list[list[float]], height: int, width: int) -> Any:
    return pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))


def _read(path: pathlib.Path) -> dict[str, list[Any]]:
    keys = ("images", "annotations", "categories")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"annotations: {path}: not readable as JSON: {error}") from error
    whole = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)
    if not whole or not all(isinstance(item, dict) for key in keys for item in content[key]):
        raise UserError(f"{path}: expected an object with lists of objects {', '.join(keys)}")
    for key, needed in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for item in content[key]:
            if missing := [name for name in needed if name not in item]:
                raise UserError(f"{path}: one of {key} lacks {', '.join(missing)}: {str(item)[:80]}")
            if not isinstance(item["id"], int | str):
                raise UserError(
                    f"{path}: one of {key} has the id {item['id']!r}; expected a number or a name"
                )
    return content


def _unique(images: Sequence[Mapping[str, Any]], skipped: list[Failure]) -> list[Mapping[str, Any]]:
    """The images of a size, whose file and id no earlier one has, and whose file lies in the folder."""
    used: list[Mapping[str, Any]] = []
    ids, names = set(), set()
    for image in images:
        name = pathlib.PurePosixPath(str(image["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            skipped.append(Failure(str(name), "its name leaves the folder of images"))
        elif not all(_is_length(image[side]) for side in ("height", "width")):
            size = f"{image['width']!r}×{image['height']!r}"
            skipped.append(Failure(str(name), f"its size is {size}; expected two positive numbers"))
        elif image["id"] in ids or str(name) in names:
            skipped.append(
                Failure(str(name), f"its id {image['id']!r} or its file is that of an earlier image")
            )
        else:
            ids.add(image["id"])
            names.add(str(name))
            used.append({**image, "file_name": str(name)})
    return used


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and 1 <= value < math.inf


def _categories(
    categories: Sequence[Mapping[str, Any]], wanted: Sequence[str], path: pathlib.Path
) -> list[Mapping[str, Any]]:
    names = [category["name"] for category in categories]
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"categories: {unknown[0]!r} is none of {path}; it has {', '.join(map(str, names))}")
    chosen = [category for category in categories if not wanted or category["name"] in wanted]
    return sorted(chosen, key=lambda category: category["id"])


def _numbered(categories: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Category id → class id, from 1."""
    ids = [category["id"] for category in categories]
    if all(isinstance(i, int) and 1 <= i <= 255 for i in ids):
        return {i: i for i in ids}
    return {i: number for number, i in enumerate(ids, 1)}


def _codecs(
    categories: Sequence[Mapping[str, Any]], config: CocoConfig, path: pathlib.Path
) -> dict[str, Codec]:
    """The codec of rgb, and of each stream that is wanted."""
    numbers = _numbered(categories)
    if not numbers or max(numbers.values()) > 255:
        raise UserError(
            f"{path}: {len(numbers)} categories; at most 255 have a colour: choose with `categories`"
        )
    names = [""] * max(numbers.values())
    for category in categories:
        names[numbers[category["id"]] - 1] = str(category["name"])
    codecs: dict[str, Codec] = {"rgb": Image()}
    wanted = config.streams or STREAMS
    if "segmentation" in wanted:
        codecs["segmentation"] = Palette(("background", *names), background=0)
    if "boxes" in wanted:
        codecs["boxes"] = Boxes(tuple(names))
    skeletons = {_skeleton(category) for category in categories if category.get("keypoints")}
    if "pose" in wanted and len(skeletons) > 1:
        raise UserError(
            f"{path}: categories of several skeletons; choose with `categories`, or leave out pose"
        )
    if "pose" in wanted and skeletons:
        joints, limbs = skeletons.pop()
        codecs["pose"] = Pose(joints, limbs, config.radius)
    if missing := set(config.streams) - set(codecs):
        raise UserError(f"streams: {missing.pop()!r}: no category of {path} has keypoints")
    return codecs


def _skeleton(category: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The joints of a category, left and right as separate words, and its limbs, counted from 0."""
    joints = tuple(str(name).replace("_", " ") for name in category["keypoints"])
    return joints, tuple(joint - 1 for limb in category.get("skeleton", ()) for joint in limb)


def _area(annotation: Annotation) -> float:
    """By its own word, else that of its box; 0 for one that is malformed, which fails when it is drawn."""
    bbox = annotation.get("bbox")
    try:
        return float(annotation.get("area") or (bbox[2] * bbox[3] if bbox else 0))
    except (TypeError, ValueError, IndexError):
        return 0.0


def _is_box(annotation: Annotation) -> bool:
    return bool(annotation.get("bbox")) and not annotation.get("iscrowd")


def _is_person(annotation: Annotation) -> bool:
    return any(annotation.get("keypoints", ())[2::3])
