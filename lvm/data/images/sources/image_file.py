"""A picture file, wherever its bytes lie, as pixels, or the reason why not."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.ExifTags
import PIL.Image

from lvm.data.images.preprocess import Preprocess, apply_exif_orientation

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MAX_PIXELS = 64_000_000
# Further pictures of other formats (MPO, TIFF) are previews and pages.
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")


class UnreadableError(Exception):
    """A file that can't become an image; the message is the reason, without the file's name."""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A picture file.

    Attributes:
      name: what failures call it: its path inside the source.
      content: its path, or what reads its bytes.
    """

    name: str
    content: pathlib.Path | Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """A decoded picture.

    Attributes:
      pixels: turned as its EXIF orientation says.
      size: width and height of the whole picture, as `pixels` is turned.
      extent: how many of the columns and rows of `pixels` it covers.
      format: of the file, such as "JPEG".
    """

    pixels: PIL.Image.Image
    size: tuple[int, int]
    extent: tuple[float, float]
    format: str


def open_image(content: pathlib.Path | Callable[[], bytes]) -> PIL.Image.Image:
    """Opens a picture by its header, without decoding. Raises UnreadableError."""
    try:
        file: pathlib.Path | io.BytesIO
        if isinstance(content, pathlib.Path):
            file, size = content, content.stat().st_size
        else:
            file, size = io.BytesIO(data := content()), len(data)
        if size == 0:
            raise UnreadableError("the file is empty (0 bytes)")
        picture = PIL.Image.open(file)
        if picture.format in _ANIMATED and getattr(picture, "is_animated", False):
            frames = getattr(picture, "n_frames", "several")
            raise UnreadableError(
                f"an animation of {frames} frames; a photo has one, a video is a source itself"
            )
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not a picture that can be decoded") from error
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableError(f"cannot be opened: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        picture.close()
        raise UnreadableError(f"{width}×{height} is more than {MAX_PIXELS // 10**6} megapixels")
    return picture


def decode_image(content: pathlib.Path | Callable[[], bytes], at_least: int = 0) -> DecodedImage:
    """Decodes a picture.

    Args:
      content: a path, or what reads the file's bytes.
      at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as no side gets shorter than this;
        0 for all pixels.

    Raises:
      UnreadableError: it can't be decoded to its end.
    """
    with open_image(content) as opened:
        size, extent, file_format = (
            opened.size,
            (float(opened.width), float(opened.height)),
            opened.format or "",
        )
        try:
            if at_least and (drafted := opened.draft(None, (at_least, at_least))):
                extent = drafted[1][2:]
            opened.load()
            turned = apply_exif_orientation(opened)
        except MemoryError:
            raise
        # Pillow's decoders raise whatever a corrupt file makes them stumble over.
        except Exception as error:
            truncated = "truncated" in str(error)
            raise UnreadableError("truncated" if truncated else f"corrupt: {error}") from error
        if turned is not opened and _sideways(opened):
            size, extent = size[::-1], extent[::-1]
        return DecodedImage(turned, size, extent, file_format)


def read_image(content: pathlib.Path | Callable[[], bytes], preprocess: Preprocess) -> np.ndarray:
    """A picture file as an image, uint8 [R, R, 3]. Raises UnreadableError, and UserError as `Preprocess` does."""
    picture = decode_for(content, preprocess)
    return preprocess(picture.pixels, picture.extent)


def decode_for(content: pathlib.Path | Callable[[], bytes], preprocess: Preprocess) -> DecodedImage:
    """Decodes what `preprocess` will make an image of, by its rule. Raises UnreadableError."""
    return decode_image(content, preprocess.resolution if preprocess.decode == "reduced" else 0)


def _sideways(picture: PIL.Image.Image) -> bool:
    return picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
