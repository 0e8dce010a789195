"""ICC profiles: conversion of photos to sRGB, and what is left as it is."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.image_file import read_image
from tests.image_files import COLORANTS, encode_image, icc_profile

srgb, ignore = (Preprocess(8, filter="nearest", icc=icc) for icc in ("srgb", "ignore"))
COLORS = np.array([[200, 100, 50], [90, 140, 100], [30, 30, 40], [250, 250, 250]], np.uint8)


def pixels(preprocess: Preprocess, image: PIL.Image.Image, format: str = "PNG", **options) -> list[list[int]]:
    """Reads an encoded image; returns the color of each quarter of its rows."""
    content = encode_image(image, format, **options)
    result = read_image(lambda: content, preprocess)
    np.testing.assert_array_equal(preprocess(PIL.Image.open(io.BytesIO(content))), result)
    return result[::2, 0].tolist()


def stripes(colors: np.ndarray = COLORS, mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(np.repeat(colors, 2, axis=0)[:, None].repeat(8, axis=1), mode)


def to_srgb(colors: np.ndarray, space: str, gamma: float) -> np.ndarray:
    """Reference in float64: linearize, change the colorants, encode as sRGB."""
    xyz = np.array(COLORANTS[space]) @ (colors.T / 255) ** (round(gamma * 256) / 256)
    linear = np.linalg.solve(np.array(COLORANTS["sRGB"]), xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).T


@pytest.mark.parametrize("space", ["P3", "Adobe"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_profile_is_converted_to_srgb(space, format) -> None:
    options = {"icc_profile": icc_profile(space), **({"lossless": True} if format == "WEBP" else {})}
    expected = to_srgb(COLORS, space, 2.2)
    assert np.abs(expected - COLORS).max() > 15
    np.testing.assert_allclose(pixels(srgb, stripes(), format, **options), expected, atol=1)
    assert pixels(ignore, stripes(), format, **options) == COLORS.tolist()


def test_profile_of_a_jpeg_is_converted_at_any_scale() -> None:
    color = np.full((4, 3), (90, 140, 100), np.uint8)
    image = stripes(color).resize((640, 640))
    content = encode_image(image, "JPEG", quality=100, subsampling=0, icc_profile=icc_profile("Adobe"))
    for decode in ("full", "reduced"):
        result = read_image(lambda: content, Preprocess(8, decode=decode))
        np.testing.assert_allclose(result.reshape(-1, 3).mean(0), to_srgb(color[:1], "Adobe", 2.2)[0], atol=3)


def test_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(srgb, stripes(), icc_profile=profile) == COLORS.tolist()


@pytest.mark.parametrize(
    "profile", [icc_profile("Adobe")[:200], b"no profile", icc_profile("CMYK"), icc_profile("GRAY")]
)
def test_profile_that_does_not_fit_counts_as_none(profile) -> None:
    assert pixels(srgb, stripes(), icc_profile=profile) == COLORS.tolist()


def test_palette_and_alpha_are_converted() -> None:
    expected = pixels(srgb, stripes(), icc_profile=icc_profile("P3"))
    assert pixels(srgb, stripes().quantize(4), icc_profile=icc_profile("P3")) == expected
    transparent = stripes()
    transparent.putalpha(PIL.Image.fromarray(np.uint8([[255]] * 4 + [[0]] * 4).repeat(8, axis=1)))
    assert pixels(srgb, transparent, icc_profile=icc_profile("P3")) == [*expected[:2], [0, 0, 0], [0, 0, 0]]


def test_gray_and_cmyk_have_profiles_of_their_own() -> None:
    gray = PIL.Image.new("L", (8, 8), 55)
    linear = pixels(srgb, gray, icc_profile=icc_profile("GRAY", 1.0))
    assert abs(linear[0][0] - 127.5) <= 1  # 55 / 255 of white
    deep = PIL.Image.fromarray(np.full((8, 8), 55 * 257, np.uint16))
    assert pixels(srgb, deep, icc_profile=icc_profile("GRAY", 1.0)) == linear
    assert pixels(srgb, gray, icc_profile=icc_profile("CMYK")) == [[55, 55, 55]] * 4
    cyan = PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert pixels(srgb, cyan, "TIFF", icc_profile=icc_profile("CMYK"))[0] == [185, 185, 185]
    assert pixels(ignore, cyan, "TIFF", icc_profile=icc_profile("CMYK"))[0] == [0, 255, 255]
    assert pixels(srgb, cyan, "TIFF", icc_profile=icc_profile("Adobe"))[0] == [0, 255, 255]


def test_annotations_are_never_converted(tmp_path) -> None:
    profile = icc_profile("P3")
    files = {
        "rgb": encode_image(stripes(), icc_profile=profile),
        "rain": encode_image(stripes(), icc_profile=profile),
        "normals": encode_image(stripes(), icc_profile=profile),
        "segmentation": encode_image(stripes(), icc_profile=profile),
        "depth": encode_image(np.full((8, 8), 200, np.uint8), icc_profile=icc_profile("GRAY", 1.0)),
    }
    for stream, content in files.items():
        (tmp_path / stream).mkdir()
        (tmp_path / stream / "a.png").write_bytes(content)
    classes = ", ".join(f'"{i}": {{"name": "c{i}", "color": {color.tolist()}}}' for i, color in enumerate(COLORS))
    (tmp_path / "classes.json").write_text(f"{{{classes}}}")
    (tmp_path / "streams.json").write_text('{"rain": {"kind": "image"}}')
    source = open_source(str(tmp_path), srgb)
    scene = source.load(0)
    assert scene.failures == ()
    images = dict(zip(scene.info.streams, scene.images[0], strict=True))
    unmanaged = open_source(str(tmp_path), ignore).load(0)
    for stream, before in zip(unmanaged.info.streams, unmanaged.images[0], strict=True):
        assert (images[stream] == before).all() == (stream not in ("rgb", "rain")), stream
    np.testing.assert_array_equal(images["normals"][::2, 0], COLORS)
    assert source.streams["segmentation"].parse(images["segmentation"])[::2, 0].tolist() == [0, 1, 2, 3]
