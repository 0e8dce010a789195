"""Image source of images with COCO-style JSON annotations: boxes, masks and keypoints, rendered at the image's size."""

import dataclasses
import hashlib
import json
import pathlib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
from etils import epath
from jaxtyping import Bool, Float, Float64, UInt8

from lvm.common.errors import UserError
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.finding import hash_files, open_folder
from lvm.data.images.sources.image_file import MAX_PIXELS, UnreadableError, decode_image
from lvm.data.images.sources.listing import NOT_UTF8, printable
from lvm.data.images.sources.readers import check_aspect
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.streams.codecs import Box, Boxes, Codec, Image, Palette, Pose

Annotation = Mapping[str, Any]

_IS_RENDERED: dict[str, Callable[[Annotation], bool]] = {  # by stream, in the order of a scene, after rgb
    "segmentation": lambda annotation: bool(annotation.get("segmentation")),
    "boxes": lambda annotation: bool(annotation.get("bbox")) and annotation.get("iscrowd") != 1,
    "pose": lambda annotation: (
        bool(joints := annotation.get("keypoints")) and (not isinstance(joints, list) or any(joints[2::3]))
    ),
}
STREAMS = tuple(_IS_RENDERED)
_MAX_NUMBER = 1e9  # beyond, pixel positions overflow
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


CocoImage = tuple[tuple[int, int], list[Annotation]]  # (height, width) in the JSON, and its annotations


class CocoSource(ImageSource[CocoImage]):
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
        info, (size, annotations) = self._scene(index)
        try:
            image = decode_image(self._folder.content(info.key), self._preprocess)
            check_aspect(image.size, size[::-1], "its annotations")  # a smaller copy is accepted
            frame = [self._preprocess(image.pixels, image.extent)]
            frame += [self._render(stream, annotations, size) for stream in info.streams[1:]]
        except (UnreadableError, UserError) as error:
            return self._scene_images(info, [], [f"{info.key}: {error}"])
        return self._scene_images(info, [np.stack(frame)])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "annotations": self._digest,
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
            "listing": hash_files(self._folder, ((info.key, info.key) for info, _ in self._scenes), tail_bytes=256),
        }

    def _list_scenes(self) -> Iterator[tuple[SceneInfo, CocoImage]]:
        path, folder = epath.Path(self.config.annotations), open_folder(self.config.images)
        self.name = path.stem
        if folder is None:
            raise UserError(f"images: {self.config.images}: no such folder; give that of the file names in {path}")
        self._folder = folder
        data, content = _load(path)
        self._digest = hashlib.sha256(data).hexdigest()
        names = _check_categories(content["categories"], path)
        for name in self.config.categories:
            if name not in names:
                raise UserError(f"categories: {name!r} is not in {path}: {', '.join(names)}")
        selected = [c for c in content["categories"] if str(c["name"]) in (self.config.categories or names)]
        by_id = sorted(selected, key=lambda category: (isinstance(category["id"], str), category["id"]))
        codecs = self._make_codecs(by_id, path)
        images = self._usable_images(content["images"])
        by_image = self._group_by_image(content, images)
        used = set[str]()
        for name, image in images.items():
            annotations = by_image[name]
            streams = ("rgb", *(s for s in STREAMS if s in codecs and any(map(_IS_RENDERED[s], annotations))))
            used.update(streams)
            size = int(image["height"]), int(image["width"])
            yield SceneInfo(name, name, "", 1, streams), (size, annotations)
        self.streams = {stream: codec for stream, codec in codecs.items() if stream in used}

    def _make_codecs(self, categories: Sequence[Mapping[str, Any]], path: epath.Path) -> dict[str, Codec]:
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
        is_posed = "pose" in requested
        skeletons = {_skeleton(category, path) for category in categories if is_posed and category.get("keypoints")}
        if len(skeletons) > 1:
            raise UserError(f"{path}: categories of several skeletons; set `categories`, or leave out pose")
        if skeletons:
            codecs["pose"] = Pose(*skeletons.pop(), self.config.radius)
        if missing := set(self.config.streams) - set(codecs):
            raise UserError(f"streams: {missing.pop()!r}: no category of {path} has keypoints")
        return codecs

    def _usable_images(self, images: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Returns the images by file name that have a size, a new id and file, and lie in the folder."""
        used: dict[str, Mapping[str, Any]] = {}
        ids = set()
        for image in images:
            if not isinstance(file_name := image["file_name"], str) or not file_name or "\0" in file_name:
                self._skip(f"image {image['id']}", f"its file_name is {reprlib.repr(file_name)}; expected a path")
                continue
            path = pathlib.PurePosixPath(file_name)
            name = str(path)
            if path.is_absolute() or ".." in path.parts:
                self._skip(printable(name), "its name leaves the folder of images")
            elif printable(name) != name:
                self._skip(printable(name), NOT_UTF8)
            elif not all(_is_number(image[side]) and image[side] >= 1 for side in ("height", "width")):
                size = f"{reprlib.repr(image['width'])}×{reprlib.repr(image['height'])}"
                self._skip(name, f"its size is {size}; expected two positive numbers")
            elif image["id"] in ids or name in used:
                self._skip(name, f"its id {image['id']!r} or its file is that of an earlier image")
            else:
                ids.add(image["id"])
                used[name] = image
        return used

    def _group_by_image(
        self, content: Mapping[str, Sequence[Annotation]], images: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[Annotation]]:
        """Returns each image's annotations of the selected categories, largest first."""
        grouped: dict[str, list[Annotation]] = {name: [] for name in images}
        by_id = {image["id"]: grouped[name] for name, image in images.items()}
        categories = {category["id"] for category in content["categories"]}
        for i, annotation in enumerate(content["annotations"]):
            name = f"annotation {own_id if _is_id(own_id := annotation.get('id')) else f'at index {i}'}"
            image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
            if not _is_id(image_id) or image_id not in by_id:
                self._skip(name, f"its image {reprlib.repr(image_id)} is not among those used")
            elif not _is_id(category_id) or category_id not in categories:
                self._skip(name, f"its category {reprlib.repr(category_id)} is not one of the file's")
            elif category_id in self._class_ids:
                by_id[image_id].append(self._drop_lines(annotation, name) | {"name": name})
        for group in grouped.values():
            group.sort(key=_area, reverse=True)
        return grouped

    def _drop_lines(self, annotation: Annotation, name: str) -> dict[str, Any]:
        """Returns the annotation without polygons of fewer than three points, which cover no pixel."""
        if not isinstance(polygons := annotation.get("segmentation"), list):
            return dict(annotation)
        kept = [polygon for polygon in polygons if not (isinstance(polygon, list) and len(polygon) in (0, 2, 4))]
        if len(kept) < len(polygons):
            self._skip(name, f"{len(polygons) - len(kept)} of its polygons have fewer than 3 points, and no area")
        return {**annotation, "segmentation": kept}

    def _render(
        self, stream: str, annotations: Sequence[Annotation], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "R R 3"]:
        """Renders a stream of an image of (height, width) `size`. Raises UnreadableError."""
        R = self._preprocess.resolution
        codec: Any = self.streams[stream]
        ids, boxes, people = np.zeros((R, R), np.int64), [], []
        for annotation in annotations:
            class_id = self._class_ids[annotation["category_id"]]
            try:
                _check_common_fields(annotation)
                if not _IS_RENDERED[stream](annotation):
                    continue
                if stream == "segmentation":
                    ids[self._mask(annotation["segmentation"], size)] = class_id
                elif stream == "boxes":
                    boxes += self._box(annotation["bbox"], class_id - 1, size)
                else:
                    people.append(self._joints(annotation["keypoints"], len(codec.joints), size))
            except ValueError as error:
                raise UnreadableError(f"{annotation['name']}: can't be rendered: {error}") from error
        if stream == "segmentation":
            return codec.render(ids)
        return codec.render(boxes if stream == "boxes" else np.stack(people), size=(R, R))

    def _mask(self, segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "R R"]:
        """Returns the mask at the image's size: polygons are transformed, then filled; RLE is resampled."""
        if not isinstance(segmentation, list):
            return self._preprocess.resize_labels(_decode_rle(segmentation, size))
        polygons = [_check_near(_numbers(polygon, "a polygon", 2), size) for polygon in segmentation]
        mapped = [self._preprocess.map_points(polygon, size).ravel().tolist() for polygon in polygons]
        R = self._preprocess.resolution
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(mapped, R, R))
        return pycocotools.mask.decode(rle).astype(bool)

    def _box(self, bbox: Any, class_id: int, size: tuple[int, int]) -> list[Box]:
        """Returns the box in the image; none if it was cropped away."""
        ((x, y, width, height),) = _numbers(bbox, "bbox", 4, rows=1)
        if min(width, height) < 0:
            raise ValueError(f"bbox is {bbox}; expected x, y, and a width and height that are not negative")
        R = self._preprocess.resolution
        corners = self._preprocess.map_points(np.array([[x, y], [x + width, y + height]]), size)
        (x0, y0), (x1, y1) = np.rint(corners).astype(int).clip(0, R).tolist()
        return [Box(class_id, x0, y0, x1, y1)] if x0 < x1 and y0 < y1 else []

    def _joints(self, keypoints: Any, num_joints: int, size: tuple[int, int]) -> Float[np.ndarray, "J 2"]:
        """Returns the joints' (x, y) in the image, NaN if not labeled."""
        if isinstance(keypoints, list):  # the position of an unlabeled joint may be anything
            labels = [keypoints[i // 3 * 3 + 2 :][:1] for i in range(len(keypoints))]
            keypoints = [0 if label == [0] else value for label, value in zip(labels, keypoints, strict=True)]
        joints = _numbers(keypoints, "keypoints", 3, rows=num_joints)
        points = _check_near(joints[:, :2], size) + 0.5  # COCO puts pixel 0's center at 0
        points = self._preprocess.map_points(points, size)
        return np.where(joints[:, 2:] > 0, points, np.nan)


def _load(path: epath.Path) -> tuple[bytes, dict[str, list[Any]]]:
    """Returns the JSON file's bytes and its content."""
    try:
        content = json.loads((data := path.read_bytes()).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"annotations: {path}: not readable as JSON: {error}") from error
    has_lists = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in _REQUIRED)
    if not has_lists or not all(isinstance(item, dict) for key in _REQUIRED for item in content[key]):
        raise UserError(f"{path}: expected an object with lists of objects {', '.join(_REQUIRED)}")
    for key, required in _REQUIRED.items():
        for item in content[key]:
            if missing := [name for name in required if name not in item]:
                raise UserError(f"{path}: one of {key} lacks {', '.join(missing)}: {str(item)[:80]}")
            if "id" in required and type(item["id"]) not in (int, str):
                raise UserError(
                    f"{path}: one of {key} has the id {reprlib.repr(item['id'])}; expected an integer or a name"
                )
    return data, content


def _check_categories(categories: Sequence[Mapping[str, Any]], path: epath.Path) -> list[str]:
    """Returns the names of the categories. Raises UserError for one without a name, and two of the same id."""
    names: dict[int | str, str] = {}
    for category in categories:
        if type(name := category["name"]) not in (int, str) or name == "":
            raise UserError(f"{path}: a category has the name {reprlib.repr(name)}; expected a string")
        if category["id"] in names:
            raise UserError(
                f"{path}: categories {names[category['id']]!r} and {str(name)!r} have the same id {category['id']!r}; "
                "expected an id for each"
            )
        names[category["id"]] = str(name)
    return list(names.values())


def _skeleton(category: Mapping[str, Any], path: epath.Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns a category's joint names, "left" and "right" as separate words, and its limbs as 0-based pairs."""
    names, limbs = category["keypoints"], category.get("skeleton") or []
    is_named = isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(limbs, list)
    if not is_named or not all(isinstance(limb, list) and [type(j) for j in limb] == [int, int] for limb in limbs):
        raise UserError(
            f"{path}: category {category['name']!r} has keypoints {reprlib.repr(names)} and skeleton "
            f"{reprlib.repr(limbs)}; expected names of joints, and pairs of their numbers from 1 on"
        )
    return tuple(name.replace("_", " ") for name in names), tuple(joint - 1 for limb in limbs for joint in limb)


def _check_common_fields(annotation: Annotation) -> None:
    """Raises ValueError for a malformed field that all streams depend on."""
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise ValueError(f"iscrowd is {reprlib.repr(annotation['iscrowd'])}; expected 0 or 1")
    if annotation.get("area") is not None and not _is_number(annotation["area"]):
        raise ValueError(f"area is {reprlib.repr(annotation['area'])}; expected a number")


def _area(annotation: Annotation) -> float:
    """Returns the annotation's area, else its box's; 0 if malformed, which then fails when rendered."""
    area, bbox = annotation.get("area"), annotation.get("bbox")
    if _is_number(area) and area:
        return float(area)
    is_box = isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))
    return float(bbox[2] * bbox[3]) if bbox and is_box else 0.0


def _is_id(value: Any) -> bool:
    return type(value) in (int, float, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER  # not so NaN


def _numbers(values: Any, field: str, columns: int, rows: int = -1) -> Float64[np.ndarray, "n {columns}"]:
    """Returns a list of numbers as rows, of any number if -1. Raises ValueError, naming the field."""
    is_list = isinstance(values, list) and all(map(_is_number, values))
    if not is_list or not values or (len(values) % columns if rows < 0 else len(values) != rows * columns):
        expected = f"{rows * columns} numbers" if rows > 0 else f"numbers, {columns} a point"
        raise ValueError(f"{field} is {reprlib.repr(values)}; expected {expected}")
    return np.array(values, np.float64).reshape(rows, columns)


def _check_near(points: Float64[np.ndarray, "n 2"], size: tuple[int, int]) -> Float64[np.ndarray, "n 2"]:
    """Returns points (x, y). Raises ValueError for one so far outside that drawing lines to it takes too long."""
    image = np.array(size[::-1])
    if (is_far := ((points < -image) | (points > 2 * image)).any(-1)).any():
        raise ValueError(f"the point {points[is_far][0].tolist()} is far outside of the image, {size[1]}×{size[0]}")
    return points


def _decode_rle(rle: Any, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Decodes a run-length encoded mask. Raises ValueError; pycocotools would read and write beyond its memory."""
    if not isinstance(rle, dict) or rle.get("size") != list(size):
        size_of = rle.get("size") if isinstance(rle, dict) else rle
        raise ValueError(f"its mask is {reprlib.repr(size_of)}, the image {list(size)} (height, width)")
    if (num_pixels := size[0] * size[1]) > MAX_PIXELS:
        raise ValueError(f"its mask has {num_pixels} pixels; expected at most {MAX_PIXELS}")
    counts = _parse_counts(text) if isinstance(text := rle.get("counts"), str) else text
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the counts of its mask are {reprlib.repr(counts)}; expected integers, none negative")
    if sum(counts) != num_pixels:
        raise ValueError(f"the counts of its mask fill {sum(counts)} of {num_pixels} pixels")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T  # columns first


def _parse_counts(text: str) -> list[int]:
    """Parses COCO's string of counts: digits of 5 bits, from 48 on; from the fourth count on, differences by two."""
    counts: list[int] = []
    value = shift = 0
    for digit in (byte - 48 for byte in text.encode("ascii")):
        if not 0 <= digit < 64 or shift > 30:
            raise ValueError(f"the counts of its mask are {reprlib.repr(text)}; expected COCO's encoding")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last of a count; 16 is its sign
            value -= (digit & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
