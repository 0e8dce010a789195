"""Picture files as the images of their streams, or the reasons why not."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import (
    DecodedImage,
    ImageFile,
    UnreadableError,
    decode_for,
    decode_image,
)
from lvm.data.streams.codecs import (
    PALETTE,
    Boxes,
    Codec,
    Depth,
    Edges,
    Image,
    Normals,
    Palette,
    codec_from_json,
)

STREAMS = ("rgb", "segmentation", "depth", "edges", "normals", "boxes", "pose")  # the order in a scene
NO_READING = 65535  # beside 0: what some sensors store where they measured nothing
_IGNORED = ("unlabelled", "unlabeled", "void", "ignore")
_BACKGROUND = ("background", "none")


class Reader(Protocol):
    """How the files of one stream are read."""

    exact: bool  # whether it reads numbers of pixels, which no decoder may round
    codec: Codec

    def read(self, picture: DecodedImage, preprocess: Preprocess) -> np.ndarray:
        """A decoded picture as the stream's image, uint8 [R, R, 3]. Raises UnreadableError or UserError."""


class RenderedReader:
    """Pictures that are images of their stream already."""

    exact = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def read(self, picture: DecodedImage, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        return preprocess(picture.pixels, picture.extent)


class DepthReader:
    """16-bit depth in the codec's unit (0 and 65535: no reading), or 8-bit grey as it is drawn."""

    exact = True

    def __init__(self, codec: Depth) -> None:
        self.codec: Codec = codec

    def read(self, picture: DecodedImage, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        readings = preprocess.resize_labels(
            np.asarray(picture.pixels)
        )  # [R, R]; a mean of readings is no reading
        mode = picture.pixels.mode
        if mode == "L":
            return np.repeat(readings[..., None], 3, axis=-1)  # [R, R, 3]
        if not mode.startswith("I"):
            raise UnreadableError(f"mode {mode}; depth is 16-bit grey, or 8-bit grey (mode L) as drawn")
        return self.codec.render(np.where(readings == NO_READING, 0, readings))  # [R, R, 3]


class SegmentationReader:
    """Class ids (modes 1, L, P and 16-bit), or exact colours (RGB).

    Args:
      codec: the classes.
      colours: the colour of each class id in RGB files.
      where: names the place that `colours` come from.
    """

    exact = True

    def __init__(self, codec: Palette, colours: Mapping[int, tuple[int, ...]], where: str) -> None:
        self.codec: Codec = codec
        self._is_mask = len(codec.names) == 2
        self._where = where
        packed = {_pack(np.array(colour)).item(): class_id for class_id, colour in colours.items()}
        self._colours = np.array(sorted(packed), np.int64)  # [K]
        self._ids = np.array([packed[colour] for colour in sorted(packed)], np.uint8)  # [K]

    def read(self, picture: DecodedImage, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        if picture.format == "JPEG":
            raise UnreadableError("a JPEG file does not keep class ids exactly; store segmentation as PNG")
        pixels, mode = np.asarray(picture.pixels), picture.pixels.mode
        if mode == "RGB":
            return self.codec.render(self._look_up(preprocess.resize_labels(pixels)))
        if mode not in ("1", "L", "P") and not mode.startswith("I"):
            raise UnreadableError(f"mode {mode}; segmentation is class ids (1, L, P, 16-bit) or RGB colours")
        if self._is_mask and mode == "L" and is_mask(pixels):
            pixels = pixels > 0
        return self.codec.render(preprocess.resize_labels(pixels).astype(np.int64))  # [R, R, 3]

    def _look_up(self, rgb: np.ndarray) -> np.ndarray:
        packed = _pack(rgb)  # [R, R]
        nearest = np.searchsorted(self._colours, packed).clip(max=len(self._colours) - 1)
        unknown = self._colours[nearest] != packed
        if unknown.any():
            raise UnreadableError(f"colour {tuple(rgb[unknown][0].tolist())} is of no class in {self._where}")
        return self._ids[nearest]  # [R, R]


def is_mask(pixels: np.ndarray) -> bool:
    """Whether 8-bit pixels are a one-bit mask: 0 and 255 alone, and some 255."""
    return bool((pixels == 255).any() and ((pixels == 255) | (pixels == 0)).all())


def _pack(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


class FrameReader:
    """Frames of picture files as scenes of images: what sources of files share.

    Args:
      readers: of each stream.
      preprocess: how pictures become images.
    """

    def __init__(self, readers: Mapping[str, Reader], preprocess: Preprocess) -> None:
        self._readers, self._preprocess = readers, preprocess
        self.streams: Mapping[str, Codec] = {stream: reader.codec for stream, reader in readers.items()}

    def load(self, info: SceneInfo, frames: Iterable[Mapping[str, ImageFile]]) -> SceneImages:
        """The scene `info` with the images of its frames; as `ImageSource.load` tells.

        A failure's key is the scene's; its reason begins with the file.
        """
        images, failures = [], []
        for frame in frames:
            try:
                images.append(self._read(frame, info.streams))
            except UnreadableError as error:
                failures.append(Failure(info.key, str(error)))
        R = self._preprocess.resolution
        stacked = np.stack(images) if images else np.empty((0, len(info.streams), R, R, 3), np.uint8)
        info = dataclasses.replace(info, num_frames=len(images))
        return SceneImages(info, stacked, tuple(failures))  # [T, S, R, R, 3]

    def _read(self, frame: Mapping[str, ImageFile], streams: tuple[str, ...]) -> np.ndarray:
        """The images of one frame, uint8 [S, R, R, 3]. Raises UnreadableError, naming the file."""
        images: list[np.ndarray] = []
        first: tuple[int, int] | None = None
        for stream in streams:
            reader, blob = self._readers[stream], frame[stream]
            try:
                decode = decode_image if reader.exact else lambda it: decode_for(it, self._preprocess)
                picture = decode(blob.content)
                first = first or picture.size
                if not same_aspect(picture.size, first):
                    (w, h), (first_w, first_h) = picture.size, first
                    raise UnreadableError(
                        f"{w}×{h} is of another shape than its {streams[0]}, {first_w}×{first_h}"
                    )
                images.append(reader.read(picture, self._preprocess))
            except (UnreadableError, UserError) as error:
                raise UnreadableError(f"{blob.name}: {error}") from error
        return np.stack(images)  # [S, R, R, 3]


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are of one shape, to within a pixel of rounding."""
    (w, h), (other_w, other_h) = size, other
    return abs(w * other_h - other_w * h) <= max(w, h, other_w, other_h)


def declared_streams(folder: pathlib.Path) -> tuple[str, ...]:
    """The streams that a folder's `streams.json` gives a codec to, beside those of `STREAMS`. Raises UserError."""
    path = folder / "streams.json"
    fields = _read_json(path)
    names = tuple(name for name in fields if name not in STREAMS)
    for name in names:
        if not isinstance(fields[name], dict) or "kind" not in fields[name]:
            raise UserError(
                f"{path}: {name!r} is no stream; expected some of {', '.join(STREAMS)}, or the kind of codec that "
                'draws it, such as {"rain": {"kind": "image"}}'
            )
    return names


def make_readers(folder: pathlib.Path, files: Mapping[str, Iterable[ImageFile]]) -> dict[str, Reader]:
    """The reader of each stream.

    Args:
      folder: its `classes.json` and `streams.json` are read if they exist.
      files: the streams, each with its files; without a `classes.json`, the first of `segmentation` are looked at.

    Raises:
      UserError: when one of the JSON files is malformed.
    """
    classes, colours = read_classes(folder / "classes.json")
    declared_streams(folder)  # refuses unknown ones
    fields = _read_json(folder / "streams.json")
    readers: dict[str, Reader] = {}
    for stream, blobs in files.items():
        default = _default_codec(stream, classes, blobs)
        codec = _override(default, fields.get(stream, {}), folder / "streams.json", stream)
        if isinstance(codec, Palette):
            where = "classes.json" if colours else "the palette of stream codecs"
            readers[stream] = SegmentationReader(codec, colours or palette_colors(codec), where)
        elif isinstance(codec, Depth):
            readers[stream] = DepthReader(codec)
        else:
            readers[stream] = RenderedReader(codec)
    return readers


def palette_colors(codec: Palette) -> dict[int, tuple[int, ...]]:
    """The colour of each class id, as the codec draws it."""
    return {int(i): tuple(PALETTE[i].tolist()) for i in codec.used_ids}


def _default_codec(stream: str, classes: Palette | None, blobs: Iterable[ImageFile]) -> Codec:
    if stream == "segmentation":
        return classes or _guess_classes(blobs)
    if stream == "boxes" and classes:
        return Boxes(classes.names)
    codecs: dict[str, Codec] = {
        "depth": Depth(near=0, far=10000, unit="mm"),
        "edges": Edges(),
        "normals": Normals(),
    }
    return codecs.get(stream, Image())


def _guess_classes(blobs: Iterable[ImageFile]) -> Palette:
    """Without a classes.json: foreground and background if the first file that says so is a mask."""
    mask = Palette(("background", "foreground"), background=0)
    for blob in blobs:
        try:
            picture = decode_image(blob.content).pixels
        except UnreadableError:
            continue  # reported when its scene is loaded
        pixels = np.asarray(picture)
        if picture.mode == "1" or (picture.mode == "L" and is_mask(pixels)):
            return mask
        if pixels.any():
            return Palette(("background", *(f"class {i}" for i in range(1, 256))), background=0)
    return mask


def _override(codec: Codec, fields: Any, path: pathlib.Path, stream: str) -> Codec:
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {stream} is {fields!r}; expected the codec's parameters by name")
    try:
        kind = fields.get("kind", codec.kind)
        return codec_from_json(codec.to_json() | fields if kind == codec.kind else fields)
    except UserError as error:
        raise UserError(f"{path}: {stream}: {error}") from error


def read_classes(path: pathlib.Path) -> tuple[Palette | None, dict[int, tuple[int, ...]]]:
    """The classes in a `classes.json`, {"0": {"name": …, "color": [r, g, b]}} or {"1": "person"}.

    Returns:
      The codec, None without the file, and the colours by class id, of those that have one.

    Raises:
      UserError: when the file is no JSON of that form, or gives two classes one colour.
    """
    names, colours = {}, {}
    for key, value in _read_json(path).items():
        entry = {"name": value} if isinstance(value, str) else value
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"]
        if not (named and key.isdecimal() and int(key) < len(PALETTE)):
            raise UserError(f"{path}: {key!r}: {value!r}; expected a class id in [0, 255] with its name")
        names[int(key)] = entry["name"]
        if "color" in entry:
            colours[int(key)] = _check_colour(entry["color"], f"{path}: {key!r}")
    if not names:
        return None, {}
    if len(set(colours.values())) < len(colours):
        raise UserError(f"{path}: two classes have the same color; expected a color for each class")
    background = 0 if names.setdefault(0, "background").lower() in _BACKGROUND else None
    ignore = next((i for i, name in sorted(names.items()) if name.lower() in _IGNORED), None)
    by_id = tuple(names.get(i, "") for i in range(max(names) + 1))
    return Palette(by_id, background, ignore), colours


def _check_colour(colour: Any, where: str) -> tuple[int, ...]:
    levels = isinstance(colour, list) and all(type(c) is int and 0 <= c < 256 for c in colour)
    if not levels or len(colour) != 3:
        raise UserError(f"{where}: color is {colour!r}; expected [red, green, blue] in [0, 255]")
    return tuple(colour)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict) or not fields:
        raise UserError(f"{path}: holds {str(fields)[:40]}; expected an object with at least one key")
    return fields
