"""One file of a folder as the image of its stream, or the reason why not."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import PIL.Image
import PIL.ImageOps

from lvm.data.preprocess import Preprocess
from lvm.data.streams import PALETTE, Boxes, Codec, Depth, Edges, Image, Normals, Palette, codec_from_json
from lvm.errors import UserError

STREAMS = ("rgb", "segmentation", "depth", "edges", "normals", "boxes", "pose")  # the order in a scene
MAX_PIXELS = 64_000_000
NO_READING = 65535  # beside 0: what some sensors store where they measured nothing
_IGNORED = ("unlabelled", "unlabeled", "void", "ignore")
_BACKGROUND = ("background", "none")


class UnreadableError(Exception):
    """A file that can't become an image; the message is the reason, without the file's name."""


def open_picture(path: pathlib.Path) -> PIL.Image.Image:
    """Opens a picture by its header, without decoding. Raises UnreadableError."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableError("the file is empty (0 bytes)")
        picture = PIL.Image.open(path)
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not a picture that can be decoded") from error
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableError(f"cannot be opened: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        picture.close()
        raise UnreadableError(f"{width}×{height} is more than {MAX_PIXELS // 10**6} megapixels")
    return picture


def decode_picture(path: pathlib.Path) -> PIL.Image.Image:
    """Decodes a picture, turned as its EXIF orientation says. Raises UnreadableError."""
    with open_picture(path) as picture:
        try:
            picture.load()
            upright = PIL.ImageOps.exif_transpose(picture)
        except MemoryError:
            raise
        # Pillow's decoders raise whatever a corrupt file makes them stumble over.
        except Exception as error:
            truncated = "truncated" in str(error)
            raise UnreadableError("truncated" if truncated else f"corrupt: {error}") from error
        upright.format = picture.format
        return upright


class Reader(Protocol):
    """How the files of one stream are read."""

    codec: Codec

    def read(self, picture: PIL.Image.Image, preprocess: Preprocess) -> np.ndarray:
        """A decoded picture as the stream's image, uint8 [R, R, 3]. Raises UnreadableError or UserError."""


class DrawnReader:
    """Pictures that are images of their stream already."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def read(self, picture: PIL.Image.Image, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        return preprocess(picture)


class DepthReader:
    """16-bit depth in the codec's unit (0 and 65535: no reading), or 8-bit grey as it is drawn."""

    def __init__(self, codec: Depth) -> None:
        self.codec: Codec = codec

    def read(self, picture: PIL.Image.Image, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        readings = preprocess.labels(np.asarray(picture))  # [R, R]; a mean of readings is no reading
        if picture.mode == "L":
            return np.repeat(readings[..., None], 3, axis=-1)  # [R, R, 3]
        if not picture.mode.startswith("I"):
            raise UnreadableError(
                f"mode {picture.mode}; depth is 16-bit grey, or 8-bit grey (mode L) as drawn"
            )
        return self.codec.draw(np.where(readings == NO_READING, 0, readings))  # [R, R, 3]


class SegmentationReader:
    """Class ids (modes 1, L, P and 16-bit), or exact colours (RGB).

    Args:
      codec: the classes.
      colours: the colour of each class id in RGB files.
      where: names the place that `colours` come from.
    """

    def __init__(self, codec: Palette, colours: Mapping[int, tuple[int, ...]], where: str) -> None:
        self.codec: Codec = codec
        self._is_mask = len(codec.names) == 2
        self._where = where
        packed = {_pack(np.array(colour)).item(): class_id for class_id, colour in colours.items()}
        self._colours = np.array(sorted(packed), np.int64)  # [K]
        self._ids = np.array([packed[colour] for colour in sorted(packed)], np.uint8)  # [K]

    def read(self, picture: PIL.Image.Image, preprocess: Preprocess) -> np.ndarray:
        """See `Reader.read`."""
        if picture.format == "JPEG":
            raise UnreadableError("a JPEG file does not keep class ids exactly; store segmentation as PNG")
        pixels = np.asarray(picture)
        if picture.mode == "RGB":
            return self.codec.draw(self._look_up(preprocess.labels(pixels)))
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise UnreadableError(
                f"mode {picture.mode}; segmentation is class ids (1, L, P, 16-bit) or RGB colours"
            )
        if self._is_mask and picture.mode == "L" and is_mask(pixels):
            pixels = pixels > 0
        return self.codec.draw(preprocess.labels(pixels).astype(np.int64))  # [R, R, 3]

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


def make_readers(root: pathlib.Path, files: Mapping[str, list[str]]) -> dict[str, Reader]:
    """The reader of each stream of a folder.

    Args:
      root: the folder; its `classes.json` and `streams.json` are read if they exist.
      files: for each stream, its files relative to `root`.

    Raises:
      UserError: when one of the JSON files is malformed.
    """
    classes, colours = read_classes(root / "classes.json")
    fields = _read_json(root / "streams.json")
    unknown = sorted(set(fields) - set(STREAMS))
    if unknown:
        raise UserError(
            f"{root / 'streams.json'}: {unknown[0]!r} is no stream; expected some of {', '.join(STREAMS)}"
        )
    readers: dict[str, Reader] = {}
    for stream, paths in files.items():
        default = _default_codec(stream, classes, root, paths)
        codec = _override(default, fields.get(stream, {}), root / "streams.json", stream)
        if isinstance(codec, Palette):
            used = {int(i): tuple(PALETTE[i].tolist()) for i in codec.used_ids}
            where = "classes.json" if colours else "the palette of stream codecs"
            readers[stream] = SegmentationReader(codec, colours or used, where)
        elif isinstance(codec, Depth):
            readers[stream] = DepthReader(codec)
        else:
            readers[stream] = DrawnReader(codec)
    return readers


def _default_codec(stream: str, classes: Palette | None, root: pathlib.Path, paths: list[str]) -> Codec:
    if stream == "segmentation":
        return classes or _guess_classes(root, paths)
    if stream == "boxes" and classes:
        return Boxes(classes.names)
    codecs: dict[str, Codec] = {
        "depth": Depth(near=0, far=10000, unit="mm"),
        "edges": Edges(),
        "normals": Normals(),
    }
    return codecs.get(stream, Image())


def _guess_classes(root: pathlib.Path, paths: list[str]) -> Palette:
    """Without a classes.json: foreground and background if the first file that says so is a mask."""
    mask = Palette(("background", "foreground"), background=0)
    for path in paths:
        try:
            picture = decode_picture(root / path)
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
        return codec_from_json(codec.to_json() | fields)
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
