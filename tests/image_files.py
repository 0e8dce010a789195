"""Image files for tests: readable ones of unusual formats, and bad ones with the reason of each failure."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from lvm.data.images.sources import ImageSource

RED, GREEN = (255, 0, 0), (0, 255, 0)


def photo(width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    """Returns smooth random colors, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC))


def encode_image(pixels: np.ndarray | PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    """Encodes an image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def encode_png(samples: np.ndarray, bits: int, transparent: tuple[int, ...] = ()) -> bytes:
    """Encodes gray [H, W] or RGB [H, W, 3] of 1 to 16 bits as PNG, with a transparent color (tRNS)."""
    height, width = samples.shape[:2]
    shifts = np.arange(bits)[::-1]
    rows = np.packbits((samples.reshape(height, -1, 1) >> shifts & 1).astype(np.uint8).reshape(height, -1), axis=1)
    data = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()  # filter 0
    alpha = [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
    header = struct.pack(">IIBBBBB", width, height, bits, 2 * (samples.ndim - 2), 0, 0, 0)
    return _png([(b"IHDR", header), *alpha, (b"IDAT", zlib.compress(data)), (b"IEND", b"")])


# Colorants of RGB spaces, XYZ under D50: columns are red, green and blue.
COLORANTS = {
    "sRGB": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
    "P3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
    "Adobe": [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
}


def icc_profile(space: str, gamma: float = 2.2) -> bytes:
    """Returns an ICC profile of version 2: one of `COLORANTS`, "GRAY", or a "CMYK" whose inks are all gray."""
    fixed = lambda *values: struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))  # noqa: E731
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if space in COLORANTS:
        for name, column in zip(b"rgb", zip(*COLORANTS[space], strict=True), strict=True):
            tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([name]) + b"TRC"] = curve
    elif space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        levels = [255 - 255 * bin(node).count("1") // 4 for node in range(16)]  # lightness by the number of inks
        grid = b"".join(bytes([level, 128, 128]) for level in levels)
        ramp = bytes(range(256))
        matrix = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
        tags[b"A2B0"] = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + grid + ramp * 3
    offset, table, data = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    kind, inks = {"GRAY": (b"mntr", b"GRAYXYZ "), "CMYK": (b"prtr", b"CMYKLab ")}.get(space, (b"mntr", b"RGB XYZ "))
    header = struct.pack(">I4sI4s8s12s4s24s", offset + len(data), b"", 0x02100000, kind, inks, b"", b"acsp", b"")
    header += bytes(4) + fixed(0.9642, 1, 0.8249) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    framed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _bomb() -> bytes:
    """Returns a PNG whose header claims 20,000 × 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return _png([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(60001))), (b"IEND", b"")])


def _palette() -> PIL.Image.Image:
    image = PIL.Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *GREEN])
    return image


def _without_palette() -> bytes:
    """Returns a palette PNG whose PLTE chunk is missing."""
    png = encode_image(_palette())
    start = png.index(b"PLTE") - 4
    return png[:start] + png[start + 12 + struct.unpack(">I", png[start : start + 4])[0] :]


def _turned() -> bytes:
    """Returns a JPEG, upright red at the left and green at the right, stored sideways with EXIF orientation 6."""
    upright = PIL.Image.new("RGB", (64, 32), GREEN)
    upright.paste(RED, (0, 0, 32, 32))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode_image(upright.transpose(PIL.Image.Transpose.ROTATE_90), "JPEG", quality=100, subsampling=0, exif=exif)


# name → (content, part of the reason)
BAD_FILES = {
    "truncated.jpg": (encode_image(photo(64, 64), "JPEG")[:-200], "truncated"),
    "empty.jpg": (b"", "the file is empty (0 bytes)"),
    "text.png": (b"no image at all", "not an image that can be decoded"),
    "bomb.png": (_bomb(), "exceeds limit"),
    "no-palette.png": (_without_palette(), "corrupt: AssertionError"),
    "avif.jpg": (encode_image(photo(), "AVIF").replace(b"av01", b"av00"), "cannot be opened"),
    "eps.jpg": (encode_image(photo(), "EPS"), "not an image that can be decoded"),  # no Ghostscript
    "dds.jpg": (encode_image(photo(), "DDS"), "not an image that can be decoded"),
    "animated.gif": (
        encode_image(photo(), "GIF", save_all=True, append_images=[PIL.Image.fromarray(photo(seed=1))]),
        "animation of 2 frames",
    ),
}
# name → (content, color of its left pixel)
UNUSUAL_FILES = {
    "cmyk.jpg": (encode_image(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "gray16.png": (encode_image(np.full((8, 8), 100 * 257, np.uint16)), (100, 100, 100)),
    "palette.png": (encode_image(_palette()), GREEN),
    "still.gif": (encode_image(_palette(), "GIF"), GREEN),
    "turned.jpg": (_turned(), RED),
    "one.png": (encode_image(PIL.Image.new("RGB", (1, 1), RED)), RED),
    "alpha.png": (encode_image(PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (0, 0, 0)),
    "wide.bmp": (encode_image(PIL.Image.new("RGB", (300, 2), RED), "BMP"), RED),
    "pages.tiff": (encode_image(PIL.Image.new("RGB", (8, 8), RED), "TIFF"), RED),
}


def check_image_files(source: ImageSource, name_of: Callable[[str], str] = lambda key: key) -> None:
    """Checks that a source of all at 16 × 16 lists the bad files and reads the others; `name_of` maps keys to files."""
    names = [name_of(source.info(index).key) for index in range(len(source))]
    assert sorted(names) == sorted(BAD_FILES | UNUSUAL_FILES)
    for index, name in enumerate(names):
        scene = source.load(index)
        if name in BAD_FILES:
            assert (scene.images.shape, scene.info.num_frames) == ((0, 1, 16, 16, 3), 0), name
            assert [failure.key for failure in scene.failures] == [scene.info.key], name
            assert BAD_FILES[name][1] in scene.failures[0].reason
        else:
            assert (scene.images.shape, scene.failures) == ((1, 1, 16, 16, 3), ()), name
            left = scene.images[0, 0, 8, 2].astype(int)
            assert np.abs(left - UNUSUAL_FILES[name][1]).max() <= 4, (name, left)


def check_copies(source: ImageSource) -> None:
    """Checks that a source pickles, describes itself equally, and checks indices."""
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(0).images, source.load(0).images)
    assert copy.describe() == source.describe()
    with pytest.raises(IndexError):
        source.load(len(source))
    with pytest.raises(IndexError):
        source.info(-1)


def white_is_zero_tiff(samples: np.ndarray) -> bytes:
    """A TIFF of 8-bit gray with these samples and PhotometricInterpretation 0 (WhiteIsZero)."""
    content = io.BytesIO()
    PIL.Image.fromarray(samples).save(content, "TIFF")
    tag = struct.pack("<HHIH", 262, 3, 1, 1)  # BlackIsZero
    assert content.getvalue().count(tag) == 1
    return content.getvalue().replace(tag, struct.pack("<HHIH", 262, 3, 1, 0))
