"""Conversion of images with an ICC profile to sRGB, by littleCMS."""

import functools
import io

import numpy as np
import PIL.Image
from PIL import ImageCms

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of a profile → mode of images
_SAME = 2  # levels of 255: a profile that moves no color further is sRGB, as its makers round it


def to_srgb(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    """Converts an L, RGB or CMYK image of a profile to sRGB (RGB); returns it as it is if there is nothing to convert.

    A profile that is damaged, or of other inks than the image, counts as none, as in browsers: sRGB is assumed.
    """
    mode, transform = _transform(profile)
    if transform is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode != "L"):
        return image
    return ImageCms.applyTransform(image.convert(mode), transform) or image


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Returns the mode of a profile's images and their transform to sRGB; None if there is none or nothing changes."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip(), "")
        if not mode:
            return "", None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return "", None
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 1, 3)  # [18³, 1, 3]
    before = PIL.Image.fromarray(probe).convert(mode)
    after = np.asarray(ImageCms.applyTransform(before, transform)).astype(int)
    is_same = mode != "CMYK" and np.abs(after - np.asarray(before.convert("RGB"))).max() <= _SAME
    return mode, None if is_same else transform
