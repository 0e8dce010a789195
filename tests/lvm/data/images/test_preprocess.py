"""Preprocessing: one geometry for images, labels and points; resizers; JSON."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.images.preprocess import FILTERS, Preprocess
from tokenizer.config import TokenizerConfig


@pytest.mark.parametrize("mode", ["squash", "center_crop"])
@pytest.mark.parametrize("size", [(37, 61), (64, 20), (5, 5)])
def test_labels_and_images_share_geometry(mode, size) -> None:
    ids = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    preprocess = Preprocess(16, mode, "nearest")
    assert preprocess.resize_labels(ids).shape == (16, 16)
    np.testing.assert_array_equal(preprocess.resize_labels(ids), preprocess(ids)[..., 0])


def test_center_crop_is_resize_then_crop() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    resized = PIL.Image.fromarray(photo).resize((40, 20), FILTERS["bicubic"])
    cropped = np.asarray(resized)[:, 10:30].astype(int)
    assert np.abs(Preprocess(20, "center_crop")(photo) - cropped).max() <= 1


def test_every_pillow_mode_becomes_rgb() -> None:
    preprocess = Preprocess(1)
    pixel = lambda mode, value: preprocess(PIL.Image.new(mode, (3, 3), value))[0, 0].tolist()  # noqa: E731
    assert pixel("1", 1) == [255, 255, 255]
    assert pixel("L", 7) == [7, 7, 7]
    assert pixel("RGBA", (255, 100, 0, 0)) == [0, 0, 0]
    assert pixel("RGBA", (200, 100, 0, 255)) == [200, 100, 0]
    assert pixel("I;16", 65535) == [255, 255, 255]
    assert pixel("I;16", 257 * 9) == [9, 9, 9]
    assert pixel("CMYK", (0, 0, 0, 255)) == [0, 0, 0]
    with pytest.raises(UserError, match="mode F"):
        pixel("F", 0.5)


def smooth(width: int, height: int) -> np.ndarray:
    """Returns an image with little detail at the scale of pixels, like a photo."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height), FILTERS["bicubic"]))


@pytest.mark.parametrize("mode", ["squash", "center_crop"])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(500, 375), (120, 340), (64, 64), (40, 30)])
def test_swscale_is_close_to_pillow(mode, filter, size) -> None:
    photo = smooth(*size)
    pillow = Preprocess(64, mode, filter)(photo).astype(int)
    swscale = Preprocess(64, mode, filter, resizer="swscale")(photo)
    assert (swscale.dtype, swscale.shape) == (np.uint8, (64, 64, 3))
    difference = np.abs(swscale - pillow)
    assert difference.mean() < 0.75
    # swscale crops at whole pixels; Pillow filters over the pixels beyond the crop.
    assert difference[2:-2, 2:-2].max() <= 4


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    resolution=st.integers(1, 40),
    mode=st.sampled_from(["squash", "center_crop"]),
)
def test_swscale_resizes_any_size(width, height, resolution, mode) -> None:
    photo = np.full((height, width, 3), (250, 7, 99), np.uint8)
    image = Preprocess(resolution, mode, resizer="swscale")(photo)
    assert image.shape == (resolution, resolution, 3)
    assert np.abs(image.astype(int) - (250, 7, 99)).max() <= 1


def test_swscale_resizes_long_images() -> None:
    for shape in ((40, 4_000, 3), (4_000, 40, 3)):
        assert Preprocess(16, resizer="swscale")(np.full(shape, 9, np.uint8)).tolist() == [[[9] * 3] * 16] * 16


def test_swscale_rejects_a_line_of_pixels() -> None:
    line = np.zeros((1, 20_000, 3), np.uint8)
    assert Preprocess(256)(line).shape == (256, 256, 3)
    with pytest.raises(UserError, match="20000×1 to 256×256"):
        Preprocess(256, resizer="swscale")(line)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_swscale_crop_is_a_square_of_whole_pixels(width, height) -> None:
    left, top, right, bottom = Preprocess(16, "center_crop", resizer="swscale")._crop_box(width, height)
    assert right - left == bottom - top == min(width, height)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    assert max(abs(left + right - width), abs(top + bottom - height)) <= 1  # centered to half a pixel


def test_labels_and_points_follow_the_swscale_crop() -> None:
    preprocess = Preprocess(16, "center_crop", resizer="swscale")
    ids = np.zeros((16, 33), np.uint8)
    ids[:, 8:24] = np.arange(16)  # the crop of 8.5 … 24.5 begins at 8
    np.testing.assert_array_equal(preprocess.resize_labels(ids), np.tile(np.arange(16), (16, 1)))
    assert preprocess.map_points(np.array([8.0, 0.0]), (16, 33)).tolist() == [0, 0]
    image = np.repeat(ids[..., None], 3, 2)
    np.testing.assert_array_equal(preprocess(image)[..., 0], preprocess.resize_labels(ids))


def test_preprocess_json_omits_default_resizer() -> None:
    fast = Preprocess(16, resizer="swscale")
    assert fast.to_json()["resizer"] == "swscale"
    assert Preprocess.from_json(fast.to_json()) == fast
    assert "resizer" not in Preprocess(16).to_json()


def test_exif_orientation_is_applied() -> None:
    photo = PIL.Image.new("RGB", (4, 2))
    photo.putpixel((0, 0), (255, 0, 0))
    photo.getexif()[0x0112] = 3  # upside down
    assert Preprocess(4, filter="nearest")(photo)[-1, -1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 0}, r"preprocess\.resolution=0"),
        ({"resolution": 8.0}, r"preprocess\.resolution: 8\.0"),
        ({"resolution": 8, "mode": "pad"}, r"preprocess\.mode='pad'"),
        ({"resolution": 8, "filter": "hamming"}, r"preprocess\.filter='hamming'"),
        ({"resolution": 8, "resizer": "opencv"}, r"preprocess\.resizer='opencv'"),
        ({"resolution": 8, "resizer": "swscale", "filter": "box"}, r"filter='box' must be one of bilinear"),
        ({"resolution": 8, "flip": 1}, r"preprocess\.flip"),
        ({"mode": "squash"}, "preprocess: .*resolution"),
        ({"resolution": 8, "colours": "-1..1"}, r"preprocess\.colours='-1\.\.1'"),
        ({"resolution": 8, "std": [0.5, 0.5, 0.5]}, r"preprocess\.std=\[0\.5, 0\.5, 0\.5\] is not supported"),
    ],
)
def test_preprocess_json_rejects_bad_fields(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        Preprocess.from_json(fields)


def test_preprocess_json_keeps_the_input_range_of_old_stores() -> None:
    fields = Preprocess(8).to_json()
    assert fields["colours"] == "0..1"
    assert Preprocess.from_json(fields) == Preprocess(8)
    assert Preprocess.from_json({"resolution": 8}) == Preprocess(8, icc="ignore")


def test_identity_without_color_management_is_unchanged() -> None:
    published = Preprocess(256, icc="ignore").to_json()
    assert published == {"resolution": 256, "mode": "squash", "filter": "bicubic", "colours": "0..1"}
    assert Preprocess(256).to_json() == published | {"icc": "srgb"}
    config = to_json(TokenizerConfig())
    assert config["preprocess"].pop("icc") == "srgb"
    assert from_config_dict(TokenizerConfig, config).preprocess.icc == "ignore"  # of a run from before the key existed
    with pytest.raises(UserError, match="icc='p3' must be one of srgb, ignore"):
        Preprocess(8, icc="p3")


def test_preprocess_json_round_trip_and_bad_arrays() -> None:
    preprocess = Preprocess(8, "center_crop", "box")
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(UserError, match="expected uint8"):
            preprocess(array)
    with pytest.raises(UserError, match="not empty"):
        preprocess.resize_labels(np.zeros((0, 4)))


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    mode=st.sampled_from(["squash", "center_crop"]),
    resolution=st.integers(1, 40),
    data=st.data(),
)
def test_points_follow_their_pixels(size, mode, resolution, data) -> None:
    preprocess = Preprocess(resolution, mode)
    ids = np.arange(size[0] * size[1]).reshape(size)
    image = preprocess.resize_labels(ids)
    row, column = (data.draw(st.integers(0, resolution - 1)) for _ in range(2))
    source_row, source_column = np.argwhere(ids == image[row, column])[0]
    # The source pixel, mapped to the result, contains the center of the pixel sampled from it.
    corners = np.array([[source_column, source_row], [source_column + 1, source_row + 1]], float)
    (x0, y0), (x1, y1) = preprocess.map_points(corners, size)
    assert x0 - 1e-6 <= column + 0.5 <= x1 + 1e-6
    assert y0 - 1e-6 <= row + 0.5 <= y1 + 1e-6


def test_map_points_by_hand() -> None:
    corners = np.array([[0, 0], [80, 40], [40, 20]])
    np.testing.assert_array_equal(Preprocess(20, "squash").map_points(corners, (40, 80)), [[0, 0], [20, 20], [10, 10]])
    np.testing.assert_array_equal(
        Preprocess(20, "center_crop").map_points(corners, (40, 80)), [[-10, 0], [30, 20], [10, 10]]
    )
