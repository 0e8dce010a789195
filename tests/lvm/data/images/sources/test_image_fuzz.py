"""Image files with single bytes changed: read, or refused with a reason, in bounded time."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.image_file import decode_image, read_image
from tests.fuzz import check_mutations
from tests.image_files import encode_image, encode_png, icc_profile, photo

_LIMIT_S = 10  # of CPU for a copy: headers may claim 64 megapixels
srgb, fast = Preprocess(16), Preprocess(16, decode="reduced", resizer="swscale")


def _corpus() -> dict[str, bytes]:
    """Returns a small file of each format, with and without palette, alpha, profile, EXIF and compression."""
    rgb, exif = PIL.Image.fromarray(photo(24, 16)), PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    alpha, gray, indexed = rgb.copy(), np.asarray(rgb.convert("L")), rgb.quantize(7)
    alpha.putalpha(PIL.Image.fromarray(photo(24, 16, seed=3)[..., 0]))
    meta = {"exif": exif, "icc_profile": icc_profile("P3")}
    bilevel, cmyk, deep = rgb.convert("1"), rgb.convert("CMYK"), gray.astype(np.uint16) * 257
    cmyk_icc = {"icc_profile": icc_profile("CMYK")}
    variants = {
        "jpeg": (rgb, "JPEG", meta),
        "jpeg-progressive": (gray, "JPEG", {"progressive": True, "icc_profile": icc_profile("GRAY")}),
        "jpeg-cmyk": (cmyk, "JPEG", cmyk_icc),
        "mpo": (rgb, "MPO", {"save_all": True, "append_images": [rgb]}),
        "png": (rgb, "PNG", meta),
        "png-palette": (indexed, "PNG", {"transparency": bytes([0, 9, 255])}),
        "png-gray16": (deep, "PNG", {}),
        "png-alpha": (alpha, "PNG", {}),
        "png-gray-alpha": (alpha.convert("LA"), "PNG", {}),
        "gif": (indexed, "GIF", {"transparency": 2}),
        "webp": (rgb, "WEBP", meta),
        "webp-lossless": (alpha, "WEBP", {"lossless": True}),
        "bmp": (rgb, "BMP", {}),
        "bmp-palette": (indexed, "BMP", {}),
        "tiff": (rgb, "TIFF", meta),
        "tiff-gray16": (deep, "TIFF", {}),
        "tiff-float": (PIL.Image.fromarray(gray).convert("F"), "TIFF", {}),
        "tiff-cmyk": (cmyk, "TIFF", cmyk_icc),
        "tiff-lzw": (alpha, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-deflate": (indexed, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff-jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff-group4": (bilevel, "TIFF", {"compression": "group4"}),
        "ppm": (rgb, "PPM", {}),
        "pbm": (bilevel, "PPM", {}),
        "avif": (alpha, "AVIF", meta),
        "jp2": (alpha, "JPEG2000", {}),
    }
    return {name: encode_image(image, format, **options) for name, (image, format, options) in variants.items()} | {
        "png-1": encode_png(gray >> 7, 1, (1,)),
        "png-gray4": encode_png(gray >> 4, 4, (9,)),
        "png-rgb16": encode_png(photo(24, 16).astype(np.int64) * 257, 16, (257, 514, 771)),
        "pgm-plain": b"P2\n# a comment\n3 3\n15\n0 1 2 3 4 5 6 7 8\n",
        "pgm16": b"P5 3 3 10000\n" + np.arange(9, dtype=">u2").tobytes(),
    }


CORPUS = _corpus()


def with_checksums(png: bytes) -> bytes:
    """Returns a PNG with the checksums of its chunks made right, so that changes in them reach the decoder."""
    position, chunks = 8, [png[:8]]
    while position + 12 <= len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        body = png[position + 4 : position + 8 + length]
        chunks.append(png[position : position + 4] + body + struct.pack(">I", zlib.crc32(body)))
        position += 12 + length
    return b"".join(chunks)


def read_photo(content: bytes) -> None:
    """Reads a file as a photo, in one of the two ways."""
    read_image(lambda: content, (srgb, fast)[zlib.crc32(content) % 2])


def read_data(content: bytes) -> None:
    """Reads a file as class ids or depth."""
    image = decode_image(lambda: content)
    image.to_samples(np.asarray(image.pixels))


def check_format(name: str, count: int) -> int:
    """Checks mutations of a file of the corpus in all ways of reading; returns how many were refused."""
    mend = with_checksums if name.startswith("png") else bytes
    readers = [read_data] if name == "tiff-float" else [read_data, read_photo]  # a photo can't be of floats
    return sum(
        check_mutations(CORPUS[name], lambda c, read=read: read(mend(c)), seed=seed, count=count, limit_s=_LIMIT_S)
        for seed, read in enumerate(readers)
    )


def test_changed_images_are_read_or_refused() -> None:
    refused = {name: check_format(name, 30) for name in CORPUS}
    assert sum(refused.values()) > 30 * len(CORPUS) / 4, refused
    assert len(CORPUS) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_many_changed_images_are_read_or_refused(name) -> None:
    assert check_format(name, 2000) > 0
