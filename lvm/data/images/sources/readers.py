"""Readers: how the image files of each stream become images, and the settings files that choose codecs."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import Crop
from lvm.data.images.sources import jpeg
from lvm.data.images.sources.image_file import DecodedImage, ImageFile, UnreadableError, decode_image
from lvm.data.images.sources.listing import SETTINGS_FILES
from lvm.data.streams import codecs
from lvm.data.streams.codecs import PALETTE, Codec, Palette

STREAMS = ("rgb", "segmentation", "depth", "edges", "normals", "boxes", "pose")  # the order in a scene
NO_READING = 65535  # like 0: some sensors store it where they measured nothing
_DEFAULT_CODECS = {"depth": codecs.Depth(0, 10000, "mm"), "edges": codecs.Edges(), "normals": codecs.Normals()}
_IGNORED = ("unlabelled", "unlabeled", "void", "ignore")
_BACKGROUND = ("background", "none")


class Reader:
    """Reader of a stream's image files that are rendered already; base class of readers of data."""

    exact = False  # pixels are data: decoding must neither scale nor convert them

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def decode(self, file: ImageFile, preprocess: Preprocess) -> DecodedImage:
        """Decodes a file; colors that are data are not converted to sRGB. Raises UnreadableError or UserError."""
        if self.exact:
            return decode_image(file.content)
        is_photo = isinstance(self.codec, codecs.Image)
        return decode_image(file.content, preprocess if is_photo else dataclasses.replace(preprocess, icc="ignore"))

    def read(self, image: DecodedImage, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        """Converts a decoded file to the stream's image. Raises UnreadableError or UserError."""
        return preprocess(image.pixels, image.extent)

    def read_file(self, file: ImageFile, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        """Decodes and converts a file. Raises UnreadableError or UserError."""
        content = file.content
        if isinstance(preprocess, Crop) and preprocess.resizer == "swscale" and not self.exact:
            data = content.read_bytes() if isinstance(content, pathlib.Path) else content()
            keeps_profile = preprocess.icc == "ignore" or not isinstance(self.codec, codecs.Image)
            if (image := jpeg.read_crop(data, preprocess, keeps_profile)) is not None:
                return image
            content = functools.partial(bytes, data)
        return self.read(self.decode(dataclasses.replace(file, content=content), preprocess), preprocess)


class DepthReader(Reader):
    """Reader of 16-bit depth in the codec's unit (0 and 65535: no reading), or of rendered 8-bit depth."""

    exact = True

    def read(self, image: DecodedImage, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        depth = preprocess.resize_labels(np.asarray(image.pixels))  # [R, R]; nearest: an average is no reading
        mode = image.pixels.mode
        if mode == "L":
            return np.repeat(depth[..., None], 3, axis=-1)
        if not mode.startswith("I"):
            raise UnreadableError(f"mode {mode}; depth is 16-bit gray, or rendered 8-bit gray (mode L)")
        depth = image.to_samples(depth)
        return self.codec.render(np.where(depth == NO_READING, 0, depth))


class SegmentationReader(Reader):
    """Reader of class ids (modes 1, L, P and 16-bit), or of exact RGB colors.

    Args:
      codec: the classes.
      colors: the RGB color of each class id; by default the codec's own.
    """

    exact = True

    def __init__(self, codec: Palette, colors: Mapping[int, tuple[int, ...]] | None = None) -> None:
        super().__init__(codec)
        self._is_mask = len(codec.names) == 2
        self._origin = "classes.json" if colors else "the palette of stream codecs"
        colors = colors or {int(i): tuple(PALETTE[i].tolist()) for i in codec.used_ids}
        packed = _pack(np.array(list(colors.values())))  # [K]
        order = np.argsort(packed)
        self._colors, self._ids = packed[order], np.array(list(colors), np.uint8)[order]  # [K]

    def read(self, image: DecodedImage, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        if image.format == "JPEG":
            raise UnreadableError("a JPEG file does not keep class ids exactly; store segmentation as PNG")
        pixels, mode = np.asarray(image.pixels), image.pixels.mode
        if mode == "RGB":
            return self.codec.render(self._look_up(preprocess.resize_labels(pixels)))
        if mode not in ("1", "L", "P") and not mode.startswith("I"):
            raise UnreadableError(f"mode {mode}; segmentation is class ids (1, L, P, 16-bit) or RGB colors")
        ids = preprocess.resize_labels(pixels)
        ids = ids > 0 if self._is_mask and mode == "L" and is_mask(pixels) else image.to_samples(ids)
        return self.codec.render(ids.astype(np.int64))

    def _look_up(self, rgb: UInt8[np.ndarray, "R R 3"]) -> UInt8[np.ndarray, "R R"]:
        packed = _pack(rgb)
        nearest = np.searchsorted(self._colors, packed).clip(max=len(self._colors) - 1)
        unknown = self._colors[nearest] != packed
        if unknown.any():
            raise UnreadableError(f"color {tuple(rgb[unknown][0].tolist())} is of no class in {self._origin}")
        return self._ids[nearest]


def is_mask(pixels: np.ndarray) -> bool:
    """Returns whether 8-bit pixels are a binary mask: 0 and 255 only, and some 255."""
    return bool((pixels == 255).any() and ((pixels == 255) | (pixels == 0)).all())


def _pack(rgb: Int[np.ndarray, "*batch 3"] | UInt8[np.ndarray, "*batch 3"]) -> Int[np.ndarray, "*batch"]:
    return rgb.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def read_frame(
    readers: Mapping[str, Reader], files: Mapping[str, ImageFile], preprocess: Preprocess
) -> UInt8[np.ndarray, "S R R 3"]:
    """Reads one frame from the file of each stream, in their order. Raises UnreadableError, naming the file.

    The aspect ratio of each file must be that of rgb, else of the first.
    """
    images: dict[str, np.ndarray] = {}
    size: tuple[int, int] | None = None
    reference, *others = sorted(files, key=lambda stream: stream != "rgb")
    for stream in (reference, *others):
        file = files[stream]
        reader = readers[stream]
        try:
            image = reader.decode(file, preprocess)
            size = size or image.size
            check_aspect(image.size, size, f"its {reference}")
            images[stream] = reader.read(image, preprocess)
        except (UnreadableError, UserError) as error:
            raise UnreadableError(f"{file.name}: {error}") from error
    return np.stack([images[stream] for stream in files])


def check_aspect(size: tuple[int, int], expected: tuple[int, int], owner: str) -> None:
    """Raises UnreadableError unless (width, height) has the expected aspect ratio to within a pixel of rounding."""
    (w, h), (expected_w, expected_h) = size, expected
    if abs(w * expected_h - expected_w * h) > max(w, h, expected_w, expected_h):
        raise UnreadableError(f"{w}×{h} differs in aspect ratio from {owner}, {expected_w}×{expected_h}")


def declared_streams(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the streams beyond `STREAMS` that a folder's `streams.json` gives a codec. Raises UserError."""
    path = folder / "streams.json"
    fields = _read_json(path)
    names = tuple(name for name in fields if name not in STREAMS)
    for name in names:
        if not isinstance(fields[name], dict) or "kind" not in fields[name]:
            raise UserError(
                f"{path}: {name!r} is no stream; expected some of {', '.join(STREAMS)}, or the kind of its codec, "
                'such as {"rain": {"kind": "image"}}'
            )
    return names


def hash_settings(folder: pathlib.Path) -> str:
    """Hashes the files of a folder that its readers follow; "" without any."""
    contents = [path.read_bytes() for name in SETTINGS_FILES if (path := folder / name).is_file()]
    return hashlib.sha256(b"\n".join(contents)).hexdigest() if contents else ""


def match_columns(columns: Sequence[str], streams: Sequence[str]) -> dict[str, str]:
    """Matches columns of image files to streams by name; without an rgb, the only other column is rgb.

    Raises:
      UserError: the column of rgb is ambiguous.
    """
    by_name = {stream: stream for stream in streams if stream in columns}
    others = [column for column in columns if column not in by_name]
    if "rgb" in by_name:
        return by_name
    if len(others) != 1:
        raise UserError(
            f"columns of images are {', '.join(columns) or 'none'}; give that of each stream, such as "
            'streams={"rgb": "image"}'
        )
    return {"rgb": others[0], **by_name}


def make_readers(folder: pathlib.Path, files: Mapping[str, Iterable[ImageFile]]) -> dict[str, Reader]:
    """Makes the reader of each stream, as the `classes.json` and `streams.json` of a folder say, if they exist.

    Raises:
      UserError: one of them is malformed.
    """
    classes, colors = read_classes(folder / "classes.json")
    declared_streams(folder)  # refuses unknown ones
    settings_path = folder / "streams.json"
    settings = _read_json(settings_path)
    readers: dict[str, Reader] = {}
    for stream, stream_files in files.items():
        codec = _default_codec(stream, classes, stream_files)
        codec = _override(codec, settings.get(stream, {}), f"{settings_path}: {stream}")
        if isinstance(codec, Palette):
            readers[stream] = SegmentationReader(codec, colors)
        elif isinstance(codec, codecs.Depth):
            readers[stream] = DepthReader(codec)
        else:
            readers[stream] = Reader(codec)
    return readers


def _default_codec(stream: str, classes: Palette | None, files: Iterable[ImageFile]) -> Codec:
    if stream == "segmentation":
        return classes or _guess_classes(files)
    if stream == "boxes" and classes:
        return codecs.Boxes(classes.names)
    return _DEFAULT_CODECS.get(stream, codecs.Image())


def _guess_classes(files: Iterable[ImageFile]) -> Palette:
    """Returns foreground and background if the first conclusive file is a binary mask, else 255 numbered classes."""
    mask = Palette(("background", "foreground"), background=0)
    for file in files:
        try:
            image = decode_image(file.content).pixels
        except UnreadableError:
            continue  # reported when its scene is loaded
        pixels = np.asarray(image)
        if image.mode == "1" or (image.mode == "L" and is_mask(pixels)):
            return mask
        if pixels.any():
            return Palette(("background", *(f"class {i}" for i in range(1, 256))), background=0)
    return mask


def _override(codec: Codec, fields: Any, key: str) -> Codec:
    """Returns the codec with the fields that `streams.json` sets; `key` names them in errors."""
    if not isinstance(fields, dict):
        raise UserError(f"{key} is {fields!r}; expected the codec's parameters by name")
    try:
        return codecs.codec_from_json(
            fields if fields.get("kind", codec.kind) != codec.kind else codec.to_json() | fields
        )
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def read_classes(path: pathlib.Path) -> tuple[Palette | None, dict[int, tuple[int, ...]]]:
    """Reads a `classes.json`: {"0": {"name": …, "color": [r, g, b]}} or {"1": "person"}.

    Returns:
      The codec, None without the file, and the colors of those class ids that have one.

    Raises:
      UserError: the file has another form, or gives two classes the same color.
    """
    names, colors = {}, {}
    for key, value in _read_json(path).items():
        entry = {"name": value} if isinstance(value, str) else value
        has_name = isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"]
        if not (has_name and key.isdecimal() and int(key) < len(PALETTE)):
            raise UserError(f"{path}: {key!r}: {value!r}; expected a class id in [0, 255] with its name")
        names[int(key)] = entry["name"]
        if "color" in entry:
            color = entry["color"]
            in_range = isinstance(color, list) and all(type(c) is int and 0 <= c < 256 for c in color)
            if not in_range or len(color) != 3:
                raise UserError(f"{path}: {key!r}: color is {color!r}; expected [red, green, blue] in [0, 255]")
            colors[int(key)] = tuple(color)
    if not names:
        return None, {}
    if len(set(colors.values())) < len(colors):
        raise UserError(f"{path}: two classes have the same color; expected a color for each class")
    background = 0 if names.setdefault(0, "background").lower() in _BACKGROUND else None
    ignore = next((i for i, name in sorted(names.items()) if name.lower() in _IGNORED), None)
    by_id = tuple(names.get(i, "") for i in range(max(names) + 1))
    return Palette(by_id, background, ignore), colors


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
