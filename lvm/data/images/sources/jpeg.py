"""Crops of JPEG photos by FFmpeg: decoded to YCbCr down to the window's last row, then cropped, scaled, converted."""

import contextlib

import av
import numpy as np
import PIL.ExifTags
import PIL.Image
from av.codec import CodecContext
from jaxtyping import UInt8

from lvm.data.images.random_crop import Crop
from lvm.data.images.sources.image_file import UnreadableError, open_image

_FORMATS = ("yuvj420p", "yuvj422p", "yuvj444p", "gray")
_STRICT = {"err_detect": "explode"}  # damaged files are errors, not concealed
_BASELINE, _START_OF_SCAN = 0xC0, 0xDA  # markers


def read_crop(data: bytes, crop: Crop, keeps_profile: bool) -> UInt8[np.ndarray, "R R 3"] | None:
    """Decodes a JPEG's crop with the resizer "swscale"; None for what Pillow must read.

    That is another format, an orientation, a color profile to apply, decoding at a fraction of the size, and any file
    that FFmpeg refuses; Pillow's reason is the one to report. Pixels differ from Pillow's by a PSNR of about 50 dB.
    Rows below the crop are not decoded, and damage there is not an error.

    Args:
      data: of the file.
      keeps_profile: an ICC profile is not applied.

    Raises:
      UserError: as `Crop` does.
    """
    with contextlib.suppress(UnreadableError, av.FFmpegError), open_image(lambda: data) as header:
        is_turned = header.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
        has_profile = "icc_profile" in header.info and not keeps_profile
        if header.format != "JPEG" or is_turned or has_profile or crop.decode == "reduced":
            return None
        box = crop.crop_box(*header.size)
        decoder = CodecContext.create("mjpeg", "r")
        decoder.thread_count, decoder.options = 1, _STRICT
        (frame,) = decoder.decode(av.Packet(_shorten(data, box[3])))
        if frame.format.name in _FORMATS and frame.width == header.width and frame.height in (box[3], header.height):
            return crop.scale_frame(_crop_planes(frame, box))
    return None


def _shorten(data: bytes, height: int) -> bytes:
    """Returns a baseline JPEG with fewer rows in its header, after which decoders stop; any other file as it is."""
    start = 2
    while data[start : start + 1] == b"\xff" and (marker := data[start + 1]) != _START_OF_SCAN:
        if marker == _BASELINE:
            return data[: start + 5] + height.to_bytes(2, "big") + data[start + 7 :]
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data


def _crop_planes(frame: av.VideoFrame, box: tuple[int, int, int, int]) -> av.VideoFrame:
    """Returns a window of a planar frame, from even pixels on."""
    left, top, right, bottom = box
    window = av.VideoFrame(right - left, bottom - top, frame.format.name)
    window.color_range, window.colorspace = frame.color_range, frame.colorspace
    for source, target in zip(frame.planes, window.planes, strict=True):
        row, column = top * source.height // frame.height, left * source.width // frame.width
        pixels = np.frombuffer(memoryview(source), np.uint8).reshape(-1, source.line_size)
        copied = np.frombuffer(memoryview(target), np.uint8).reshape(-1, target.line_size)
        copied[: target.height, : target.width] = pixels[row : row + target.height, column : column + target.width]
    return window
