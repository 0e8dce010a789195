"""How a picture of any size becomes an image of the model's size, and its annotations with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import av
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from av.video.reformatter import Interpolation, VideoReformatter

from lvm.common.errors import UserError

MODES = ("squash", "center_crop")
COLOURS = ("0..1",)  # what a network sees of uint8: divided by 255
DECODES = ("full", "reduced")
FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "box": PIL.Image.Resampling.BOX,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
RESIZERS = ("pillow", "swscale")
_SWSCALE = {
    "bilinear": Interpolation.BILINEAR,
    "bicubic": Interpolation.BICUBIC,
    "lanczos": Interpolation.LANCZOS,
}
# The same pixels whatever instructions a processor has, and no colour left out.
_EXACTLY = (
    Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The geometry that every stream of a scene goes through.

    Attributes:
      resolution: side of the result in pixels.
      mode: "squash" scales the whole picture to resolution × resolution; "center_crop" scales its short
        side to `resolution` and keeps the centre.
      filter: "nearest", "box", "bilinear", "bicubic" or "lanczos", for images; all but "nearest" are
        antialiased. Labels always take the nearest reading.
      colours: the range that the network's inputs and outputs have; "0..1" is all that is built, and the field
        says so to whoever reads it.
      decode: "full" decodes all pixels; "reduced" lets the JPEG decoder leave out frequencies that the resize would
        throw away: large photos come at 1/2, 1/4 or 1/8, never smaller than `resolution`. Several times as fast,
        and other pixels: codes of the one are not those of the other.
      resizer: "pillow", which published tokenizers have seen, or "swscale" (FFmpeg's), more than twice as fast: a
        photo's pixels differ by a level or two of 255, those of noise and of pictures of a few pixels by more. It
        takes "bilinear", "bicubic" and "lanczos", crops at whole pixels, and refuses lines of thousands of pixels.

    Raises:
      UserError: for a resolution that is no positive integer, or an unknown mode, filter, range, decode or resizer.
    """

    resolution: int
    mode: str = "squash"
    filter: str = "bicubic"
    colours: str = "0..1"
    decode: str = "full"
    resizer: str = "pillow"

    def __post_init__(self) -> None:
        whole = isinstance(self.resolution, int) and not isinstance(self.resolution, bool)
        if not whole or self.resolution < 1:
            raise UserError(f"resolution is {self.resolution!r}; it must be a positive integer")
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.filter not in FILTERS:
            raise UserError(f"filter is {self.filter!r}; it must be one of {', '.join(FILTERS)}")
        if self.colours not in COLOURS:
            raise UserError(f"colours is {self.colours!r}; it must be one of {', '.join(COLOURS)}")
        if self.decode not in DECODES:
            raise UserError(f"decode is {self.decode!r}; it must be one of {', '.join(DECODES)}")
        if self.resizer not in RESIZERS:
            raise UserError(f"resizer is {self.resizer!r}; it must be one of {', '.join(RESIZERS)}")
        if self.resizer == "swscale" and self.filter not in _SWSCALE:
            raise UserError(f"filter is {self.filter!r}; the resizer 'swscale' takes {', '.join(_SWSCALE)}")

    def __call__(
        self, picture: PIL.Image.Image | np.ndarray, extent: tuple[float, float] | None = None
    ) -> np.ndarray:
        """The picture as uint8 [R, R, 3].

        Args:
          picture: a PIL image of any mode but F, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. An EXIF
            orientation is applied, alpha is composed over black, and grey of more than 8 bits is read as
            16 bits and scaled to 8.
          extent: how many of its columns and rows the picture covers, where it was decoded at a fraction of its
            size and the last ones are partly beyond it; all by default.

        Raises:
          UserError: for an array of another dtype or shape, and for a picture of floats (mode F), whose
            range is unknown.
        """
        rgb = _to_rgb(_from_array(picture) if isinstance(picture, np.ndarray) else picture)
        size = (self.resolution, self.resolution)
        box = self._box(*(extent or rgb.size))
        if self.resizer == "swscale":
            left, top, right, bottom = map(int, box)
            return self._by_swscale(np.asarray(rgb)[top:bottom, left:right])
        # With `box`, Pillow still filters over the pixels outside of it: this is resize, then crop.
        return np.asarray(rgb.resize(size, FILTERS[self.filter], box=box))  # [R, R, 3]

    def resize_labels(self, labels: np.ndarray) -> np.ndarray:
        """Class ids or depth readings [H, W, ...] of any dtype as [R, R, ...], by the nearest reading.

        Raises:
          UserError: for an array without two dimensions that are not empty.
        """
        if labels.ndim < 2 or 0 in labels.shape[:2]:
            raise UserError(f"labels have shape {list(labels.shape)}; expected [H, W], not empty")
        height, width = labels.shape[:2]
        left, top, right, bottom = self._box(width, height)
        centres = (np.arange(self.resolution) + 0.5) / self.resolution
        rows = (top + centres * (bottom - top)).astype(np.intp)
        columns = (left + centres * (right - left)).astype(np.intp)
        return labels[rows[:, None], columns]  # [R, R, ...]

    def map_points(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Places (x, y) in a picture, float [..., 2], as places in its image; those cropped away lie outside of it.

        A place counts pixels from the picture's upper left corner: the middle of its first pixel is (0.5, 0.5).

        Args:
          points: the places.
          size: the picture's (height, width).
        """
        left, top, right, bottom = self._box(size[1], size[0])
        scale = self.resolution / np.array([right - left, bottom - top])
        return (np.asarray(points, np.float64) - [left, top]) * scale

    def to_json(self) -> dict[str, Any]:
        """The fields, as `from_json` reads them; a full decode and Pillow go without saying."""
        fields, unsaid = dataclasses.asdict(self), {"decode": "full", "resizer": "pillow"}
        return {name: value for name, value in fields.items() if unsaid.get(name) != value}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Preprocess:
        """The preprocess that `to_json` wrote. Raises UserError for missing, unknown or impossible fields."""
        known = [field.name for field in dataclasses.fields(cls)]
        if "resolution" not in fields or not set(fields) <= set(known):
            raise UserError(f"preprocess has the keys {sorted(fields)}; expected some of {', '.join(known)}")
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"preprocess.{error}") from None

    def _by_swscale(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] → [R, R, 3]. Raises UserError for what swscale refuses: a line of thousands of pixels."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        # To three planes, not to interleaved colours, which would take it twice as long.
        R, interpolation = self.resolution, _SWSCALE[self.filter] | _EXACTLY
        try:
            scaled = VideoReformatter().reformat(frame, R, R, "gbrp", interpolation=interpolation, threads=1)
        except av.FFmpegError as error:
            height, width = pixels.shape[:2]
            raise UserError(f"swscale can't resize {width}×{height} to {R}×{R}: {error.strerror}") from error
        return np.ascontiguousarray(scaled.to_ndarray())

    def _box(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is kept of a picture."""
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        if self.mode == "center_crop":
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            right, bottom = left + side, top + side
        if self.resizer == "swscale":
            width, height = max(1, round(right - left)), max(1, round(bottom - top))
            left, top = math.floor(left), math.floor(top)
            right, bottom = left + width, top + height
        return left, top, right, bottom


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    drawable = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not drawable or 0 in array.shape:
        raise UserError(
            f"a picture has dtype {array.dtype} and shape {list(array.shape)}; "
            "expected uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    return PIL.Image.fromarray(array)


def apply_exif_orientation(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture turned as its EXIF orientation says; itself where it says nothing, for a copy takes its time."""
    turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    return PIL.ImageOps.exif_transpose(picture) if turned else picture


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    picture = apply_exif_orientation(picture)
    if picture.mode == "F":
        raise UserError("a picture holds floats (mode F), whose range is unknown; expected 8 or 16 bits")
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = PIL.Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        black = PIL.Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = PIL.Image.alpha_composite(black, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
