"""Decoding of image files, on disk or inside an archive. Every failure has a reason."""

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.ExifTags
import PIL.Image
from jaxtyping import UInt8

from lvm.data.images.preprocess import Preprocess, apply_exif_orientation

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MAX_PIXELS = 64_000_000
# In other multi-image formats (MPO, TIFF), further images are previews and pages.
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")

Content = pathlib.Path | Callable[[], bytes]  # a path, or a function that reads the file's bytes


class UnreadableError(Exception):
    """A file that cannot be decoded. The message is the reason, without the file's name."""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An undecoded image file. `name` identifies it in failures: its path inside the source."""

    name: str
    content: Content


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """A decoded image."""

    pixels: PIL.Image.Image  # EXIF orientation is applied
    size: tuple[int, int]  # width and height of the full image, oriented as `pixels`
    extent: tuple[float, float]  # columns and rows of `pixels` that the image covers
    format: str  # of the file, such as "JPEG"


def open_image(content: Content) -> PIL.Image.Image:
    """Opens an image by its header, without decoding. Raises UnreadableError."""
    try:
        file: pathlib.Path | io.BytesIO
        if isinstance(content, pathlib.Path):
            file, size = content, content.stat().st_size
        else:
            file, size = io.BytesIO(data := content()), len(data)
        if size == 0:
            raise UnreadableError("the file is empty (0 bytes)")
        image = PIL.Image.open(file)
        if image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
            num_frames = getattr(image, "n_frames", "several")
            raise UnreadableError(f"animation of {num_frames} frames; read it as a video source")
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not an image that can be decoded") from error
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableError(f"cannot be opened: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableError(f"{width}×{height} is more than {MAX_PIXELS // 10**6} megapixels")
    return image


def decode_image(content: Content, min_side: int = 0) -> DecodedImage:
    """Decodes an image. Raises UnreadableError if the file is corrupt or truncated.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as no side is below `min_side`; 0 for full size.
    """
    with open_image(content) as opened:
        size, extent = opened.size, (float(opened.width), float(opened.height))
        try:
            if min_side and (drafted := opened.draft(None, (min_side, min_side))):
                extent = drafted[1][2:]
            opened.load()
            oriented = apply_exif_orientation(opened)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise errors of any type on corrupt files
            reason = "truncated" if "truncated" in str(error) else f"corrupt: {error}"
            raise UnreadableError(reason) from error
        if opened.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):  # turned by 90° or 270°
            size, extent = size[::-1], extent[::-1]
        return DecodedImage(oriented, size, extent, opened.format or "")


def read_image(content: Content, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
    """Decodes and preprocesses an image. Raises UnreadableError, and UserError as `Preprocess` does."""
    image = decode_image(content, preprocess.min_decode_side)
    return preprocess(image.pixels, image.extent)
