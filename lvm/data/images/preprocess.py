"""Preprocessing of images of any size, and of their annotations, to the model's size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import av
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float, Num, Shaped, UInt8

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_positive
from lvm.data.images.color import to_srgb

FILTERS = {n: PIL.Image.Resampling[n.upper()] for n in ("nearest", "box", "bilinear", "bicubic", "lanczos")}
_SWSCALE_FILTERS = {name: Interpolation[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
_SWSCALE_FLAGS = Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same pixels on every CPU
_SWSCALE_FLAGS |= Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT  # full chroma resolution
_RANGE = {"colours": "0..1"}  # in every identity on disk: the network's input is uint8 / 255
_NORMALIZATION = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}  # of that input; in exports, for other software
# Not written at these values: identities from before stay valid.
_OMITTED = {"decode": "full", "resizer": "pillow", "icc": "ignore"}

Number = int | float


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The geometry that all streams of a scene share.

    Attributes:
      resolution: side of the result in pixels.
      mode: "squash" scales the whole image to resolution × resolution; "center_crop" scales its short side to
        `resolution` and keeps the center.
      filter: "nearest", "box", "bilinear", "bicubic" or "lanczos", for images; all but "nearest" are antialiased.
        Labels are always sampled at the nearest pixel.
      decode: "full" decodes all pixels; "reduced" lets the JPEG decoder scale large photos by 1/2, 1/4 or 1/8, never
        below `resolution`: several times as fast, but pixels and therefore codes differ.
      resizer: "pillow", used by published tokenizers, or "swscale" (FFmpeg), more than twice as fast: pixels of photos
        differ by one or two levels of 255, those of noise and of tiny images by more. swscale supports "bilinear",
        "bicubic" and "lanczos", crops at whole pixels, and refuses lines of thousands of pixels.
      icc: "srgb" converts images with an ICC profile (Display P3, Adobe RGB, CMYK) to sRGB; "ignore", as published
        tokenizers were trained, takes all as sRGB.

    Raises:
      UserError: an impossible value.
    """

    resolution: int
    mode: str = "squash"
    filter: str = "bicubic"
    decode: str = "full"
    resizer: str = "pillow"
    icc: str = "srgb"

    absent: ClassVar[Mapping[str, str]] = {"icc": "ignore"}  # in records from before the key existed

    def __post_init__(self) -> None:
        check_positive(self, "resolution")
        check_choice(self, "mode", ("squash", "center_crop"))
        check_choice(self, "filter", FILTERS)
        check_choice(self, "decode", ("full", "reduced"))
        check_choice(self, "resizer", ("pillow", "swscale"))
        check_choice(self, "icc", ("srgb", "ignore"))
        if self.resizer == "swscale":
            check_choice(self, "filter", _SWSCALE_FILTERS)

    def __call__(
        self, image: PIL.Image.Image | np.ndarray, extent: tuple[Number, Number] | None = None
    ) -> UInt8[np.ndarray, "R R 3"]:
        """Converts an image to RGB at the model's size.

        Args:
          image: a PIL image of any mode but F, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. Its EXIF orientation
            is applied, alpha is composed over black, and gray of more than 8 bits is scaled from 16 bits to 8.
          extent: columns and rows that the image covers, if it was decoded at a fraction of its size and the last
            ones are partly beyond it; all by default.

        Raises:
          UserError: an array of another dtype or shape, or an image of floats (mode F), whose range is unknown.
        """
        if isinstance(image, np.ndarray):
            has_image_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
            if image.dtype != np.uint8 or not has_image_shape or 0 in image.shape:
                shape = f"{image.dtype} {list(image.shape)}"
                raise UserError(f"an image is {shape}; expected uint8 [H, W], [H, W, 3] or [H, W, 4]")
            image = PIL.Image.fromarray(image)
        rgb = self.to_rgb(image)
        box = self._crop_box(*(extent or rgb.size))
        if self.resizer == "swscale":
            left, top, right, bottom = map(int, box)
            return self._swscale(np.asarray(rgb)[top:bottom, left:right])
        # With `box`, Pillow still filters over the pixels outside of it: this is resize, then crop.
        return np.asarray(rgb.resize((self.resolution, self.resolution), FILTERS[self.filter], box=box))

    def to_rgb(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Converts an image of any mode but F to upright RGB of its own size. Raises UserError for mode F."""
        profile = image.info.get("icc_profile") if self.icc == "srgb" else None
        image = apply_exif_orientation(image)
        if image.mode == "F":
            raise UserError("an image holds floats (mode F), whose range is unknown; expected 8 or 16 bits")
        if image.mode.startswith("I"):
            gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            gray[gray == image.info.get("transparency")] = 0
            image = PIL.Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        is_gray = image.mode in ("1", "L", "LA")
        if image.has_transparency_data:
            black = PIL.Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = PIL.Image.alpha_composite(black, image.convert("RGBA"))
        if profile:
            image = to_srgb(image.convert("L") if is_gray else image, profile)
        return image if image.mode == "RGB" else image.convert("RGB")

    @property
    def render_side(self) -> int:
        """The side of images that are rendered to be preprocessed."""
        return self.resolution

    def min_decode_side(self, size: tuple[int, int]) -> int:
        """Returns the side that decoding must not reduce an image of this size below; 0 to decode all pixels."""
        return self.resolution if self.decode == "reduced" else 0

    def resize_labels(self, labels: np.ndarray) -> Shaped[np.ndarray, "R R *rest"]:
        """Resizes class ids or depth [H, W, ...] of any dtype by nearest sampling.

        Raises:
          UserError: fewer than two dimensions, or an empty one.
        """
        if labels.ndim < 2 or 0 in labels.shape[:2]:
            raise UserError(f"labels have shape {list(labels.shape)}; expected [H, W], not empty")
        height, width = labels.shape[:2]
        left, top, right, bottom = self._crop_box(width, height)
        centers = (np.arange(self.resolution) + 0.5) / self.resolution
        rows = (top + centers * (bottom - top)).astype(np.intp)
        columns = (left + centers * (right - left)).astype(np.intp)
        return labels[rows[:, None], columns]

    def map_points(self, points: Num[np.ndarray, "*batch 2"], size: tuple[int, int]) -> Float[np.ndarray, "*batch 2"]:
        """Maps points (x, y) of an image of (height, width) `size` to the resized one, or outside of it if cropped.

        Points are in pixels from the upper left corner: the center of the first pixel is (0.5, 0.5).
        """
        left, top, right, bottom = self._crop_box(size[1], size[0])
        scale = self.resolution / np.array([right - left, bottom - top])
        return (np.asarray(points, np.float64) - [left, top]) * scale

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as `from_json` reads them. They are part of a tokenizer's hash."""
        fields = dataclasses.asdict(self) | _RANGE
        return {name: value for name, value in fields.items() if _OMITTED.get(name) != value}

    def to_export(self) -> dict[str, Any]:
        """Returns all fields, with range, mean and deviation of the network's input, as `from_json` reads them."""
        return dataclasses.asdict(self) | _RANGE | _NORMALIZATION

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Preprocess:
        """Builds the preprocess that `to_json` or `to_export` wrote.

        Raises:
          UserError: missing, unknown or impossible fields.
        """
        if not isinstance(fields, Mapping):
            raise UserError(f"preprocess is {fields!r}; expected an object of its fields")
        fields = {**_RANGE, **_NORMALIZATION, **fields}
        for key, expected in (_RANGE | _NORMALIZATION).items():
            if (value := fields.pop(key)) != expected:
                raise UserError(f"preprocess.{key}={value!r} is not supported; inputs are uint8 / 255: {expected!r}")
        return from_config_dict(cls, fields, "preprocess")

    def _swscale(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "R R 3"]:
        return self.scale_frame(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))

    def scale_frame(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "R R 3"]:
        """Resizes a frame with FFmpeg. Raises UserError for what swscale refuses: a line of thousands of pixels."""
        # Planar output: interleaved RGB takes twice as long.
        R, interpolation = self.resolution, _SWSCALE_FILTERS[self.filter] | _SWSCALE_FLAGS
        try:
            scaled = VideoReformatter().reformat(frame, R, R, "gbrp", interpolation=interpolation, threads=1)
        except av.FFmpegError as error:
            size = f"{frame.width}×{frame.height}"
            raise UserError(f"swscale can't resize {size} to {R}×{R}: {error.strerror}") from error
        image = np.empty((R, R, 3), np.uint8)
        for channel, plane in zip((1, 2, 0), scaled.planes, strict=True):  # several times as fast as `to_ndarray`
            image[..., channel] = np.frombuffer(memoryview(plane), np.uint8).reshape(R, plane.line_size)[:, :R]
        return image

    def _crop_box(self, width: Number, height: Number) -> tuple[Number, Number, Number, Number]:
        """Returns left, top, right and bottom of what is kept of an image."""
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


def apply_exif_orientation(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the image turned upright; the same object if its EXIF orientation is the default (a copy is slow)."""
    is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    return PIL.ImageOps.exif_transpose(image) if is_turned else image
