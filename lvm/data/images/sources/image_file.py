"""Decoding of image files, on disk or inside an archive. Every failure has a reason."""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
from jaxtyping import Shaped, UInt8

from lvm.common.errors import UnavailableError, UserError, check_available
from lvm.data.images.preprocess import Preprocess, apply_exif_orientation
from lvm.data.images.sources.listing import IMAGE_FORMATS

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
    white: int = 255  # of the file's own samples, if Pillow scaled them: gray of 2 and 4 bits, a PGM's maximum
    is_inverted: bool = False  # gray of a TIFF whose samples are 0 for white: Pillow inverted them

    def to_samples(self, gray: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Converts values of `pixels`, of one channel, to the samples in the file."""
        if self.is_inverted:
            gray = 255 - gray
        if self.white in (255, 65535):
            return gray
        scale = 255 if self.pixels.mode == "L" else 65535
        return (gray.astype(np.int64) * self.white + scale // 2) // scale


def open_image(content: Content) -> PIL.ImageFile.ImageFile:
    """Opens an image by its header, without decoding. Raises UnreadableError."""
    with _reasons("cannot be opened"):
        file: pathlib.Path | io.BytesIO
        if isinstance(content, pathlib.Path):
            file, size = content, content.stat().st_size
        else:
            file, size = io.BytesIO(data := content()), len(data)
        if size == 0:
            raise UnreadableError("the file is empty (0 bytes)")
        image = PIL.Image.open(file, formats=tuple(IMAGE_FORMATS))
        if image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
            num_frames = getattr(image, "n_frames", "several")
            raise UnreadableError(f"animation of {num_frames} frames; read it as a video source")
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableError(f"{width}×{height} is more than {MAX_PIXELS // 10**6} megapixels")
    return image


def decode_image(content: Content, preprocess: Preprocess | None = None) -> DecodedImage:
    """Decodes an image: as RGB for a `preprocess`, as the file's own pixels without.

    Raises:
      UnreadableError: the file is corrupt or truncated.
      UserError: as `Preprocess.to_rgb` does.
    """
    with open_image(content) as opened, _reasons("corrupt"):
        size, extent = opened.size, (float(opened.width), float(opened.height))
        min_side = preprocess.min_decode_side(opened.size) if preprocess else 0
        if min_side and (drafted := opened.draft(None, (min_side, min_side))):
            extent = drafted[1][2:]
        white, raw_mode = _white_level(opened), _raw_mode(opened)
        is_inverted = opened.format == "TIFF" and raw_mode.startswith("L;") and "I" in raw_mode
        _mend_transparency(opened, content, white)
        opened.load()
        if opened.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):  # turned by 90° or 270°
            size, extent = size[::-1], extent[::-1]
        pixels = preprocess.to_rgb(opened) if preprocess else apply_exif_orientation(opened)
        pixels.info = {}  # its transparency and color profile are applied, or pixels are data
        return DecodedImage(pixels, size, extent, opened.format or "", white, is_inverted)


def read_image(content: Content, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
    """Decodes and preprocesses an image. Raises UnreadableError, and UserError as `Preprocess` does."""
    image = decode_image(content, preprocess)
    return preprocess(image.pixels, image.extent)


def _raw_mode(image: PIL.ImageFile.ImageFile) -> str:
    """Returns the layout of an opened file's samples, such as "L;4"."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if args and isinstance(args, tuple) else args)


def _white_level(image: PIL.ImageFile.ImageFile) -> int:
    for tile in image.tile:
        if tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple):
            return int(tile.args[1])
    return {"L;2": 3, "L;4": 15}.get(_raw_mode(image)[:3], 255)


def _mend_transparency(image: PIL.ImageFile.ImageFile, content: Content, white: int) -> None:
    """Makes PNG's transparent gray or color that of the decoded pixels: Pillow keeps that of the file's samples."""
    color = image.info.get("transparency")
    if isinstance(color, int) and white < 255:
        image.info["transparency"] = color * 255 // white
    elif isinstance(color, tuple) and _raw_mode(image) == "RGB;16B":
        del image.info["transparency"]
        with open_image(content) as low:  # Pillow decodes the high bytes; read as little-endian, the low ones
            low.tile = [low.tile[0]._replace(args="RGB;16L")]
            samples = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        image.putalpha(PIL.Image.fromarray((samples != color).any(axis=-1)))


@contextlib.contextmanager
def _reasons(step: str) -> Iterator[None]:
    """Raises UnreadableError instead of Pillow's errors, which are of any type on corrupt files.

    UserError and UnavailableError remain.
    """
    try:
        yield
    except (UnreadableError, UnavailableError, UserError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not an image that can be decoded") from error
    except Exception as error:
        check_available(error)
        reason = "truncated" if "truncated" in str(error) else f"{step}: {str(error) or type(error).__name__}"
        raise UnreadableError(reason) from error
