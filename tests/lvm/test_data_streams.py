"""What a stream codec draws is what it reads back, within the error that it states."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.data import streams
from lvm.data.preprocess import FILTERS, Preprocess
from lvm.errors import UserError

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
names = st.integers(1, 255).map(lambda n: tuple(f"class {i}" for i in range(n)))
quick = settings(max_examples=40, deadline=None)


def unit_vectors(shape: tuple[int, ...], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(*shape, 3))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_palette_colours_are_distinct_and_the_first_are_far_apart() -> None:
    colours = streams.PALETTE.astype(int)
    distance = ((colours[:, None] - colours) ** 2).sum(-1)
    np.fill_diagonal(distance, distance.max())
    assert colours.shape == (256, 3)
    assert colours[:3].tolist() == [[0, 0, 0], [255, 255, 255], [0, 128, 255]]
    assert distance.min() >= 31**2
    assert distance[:8, :8].min() >= 179**2


@quick
@given(data=st.data(), names=names, shape=shapes)
def test_palette_reads_back_exactly(data, names, shape) -> None:
    ids = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, len(names) - 1)))
    codec = streams.Palette(names)
    np.testing.assert_array_equal(codec.parse(codec.draw(ids)), ids)


@quick
@given(seed=st.integers(0, 99), shape=shapes)
def test_palette_withstands_noise_below_half_the_distance_of_its_colours(seed, shape) -> None:
    rng = np.random.default_rng(seed)
    codec = streams.Palette(tuple("abcdefgh"))
    ids = rng.integers(0, 8, shape)
    noisy = codec.draw(ids) + rng.integers(-50, 51, (*shape, 3))  # 50 · √3 < 179 / 2
    np.testing.assert_array_equal(codec.parse(noisy.clip(0, 255).astype(np.uint8)), ids)


def test_palette_skips_ids_without_a_name() -> None:
    codec = streams.Palette(("none", "", "cat"), background=0)
    almost_the_unnamed = np.full((1, 1, 3), 254, np.uint8)
    assert codec.parse(almost_the_unnamed)[0, 0] != 1
    with pytest.raises(UserError, match=r"class ids \[1, 7\] have no name"):
        codec.draw(np.array([[0, 1, 2, 7]]))


@quick
@given(
    data=st.data(),
    shape=shapes,
    near=st.integers(0, 1000),
    extent=st.integers(1, 10000),
)
def test_depth_reads_back_within_half_a_level(data, shape, near, extent) -> None:
    codec = streams.Depth(near, near + extent, "mm")
    inside = st.floats(max(near, 1e-6), near + extent)
    depth = data.draw(hnp.arrays(np.float64, shape, elements=st.just(0.0) | inside))
    parsed = codec.parse(codec.draw(depth))
    np.testing.assert_array_equal(parsed == 0, depth == 0)
    assert parsed.dtype == np.float32
    np.testing.assert_allclose(parsed, depth, rtol=1e-5, atol=extent / 508 * 1.001)


def test_depth_levels() -> None:
    codec = streams.Depth(100, 354, "mm")
    drawn = codec.draw(np.array([[0.0, 1.0, 100.0, 101.0, 354.0, 9999.0]]))
    assert drawn[0, :, 0].tolist() == [0, 255, 255, 254, 1, 1]
    with pytest.raises(UserError, match="NaN or negative"):
        codec.draw(np.array([[np.nan]]))


@quick
@given(strength=hnp.arrays(np.float32, shapes, elements=st.floats(0, 1, width=32)))
def test_edges_read_back_within_half_a_level(strength) -> None:
    codec = streams.Edges()
    np.testing.assert_allclose(codec.parse(codec.draw(strength)), strength, atol=1 / 510 + 1e-6)


@quick
@given(seed=st.integers(0, 999), shape=shapes)
def test_normals_read_back_and_flip(seed, shape) -> None:
    codec, normals = streams.Normals(), unit_vectors(shape, seed)
    parsed = codec.parse(codec.draw(normals))
    np.testing.assert_allclose(parsed, normals, atol=0.01)
    flipped = codec.flip(normals)
    np.testing.assert_array_equal(flipped[:, ::-1] * np.float32([-1, 1, 1]), normals)
    # The colour of −x is 255 minus the colour of x.
    np.testing.assert_allclose(codec.draw(flipped)[..., 0], 255 - codec.draw(normals)[:, ::-1, 0], atol=1)


@quick
@given(seed=st.integers(0, 999), count=st.integers(0, 9))
def test_boxes_apart_read_back_exactly(seed, count) -> None:
    rng = np.random.default_rng(seed)
    codec, boxes = streams.Boxes(("a", "b", "c")), []
    for cell in rng.permutation(9)[:count]:  # one box in each 8 × 8 cell, never touching the next
        y, x = divmod(int(cell), 3)
        (x0, x1), (y0, y1) = (np.sort(rng.choice(7, 2, replace=False)) for _ in range(2))
        boxes.append(streams.Box(int(rng.integers(3)), 8 * x + x0, 8 * y + y0, 8 * x + x1, 8 * y + y1))
    assert sorted(codec.parse(codec.draw(boxes, size=(24, 24)))) == sorted(boxes)


def test_later_boxes_cover_earlier_ones_and_must_lie_inside() -> None:
    codec = streams.Boxes(("a", "b"))
    image = codec.draw([streams.Box(0, 0, 0, 8, 8), streams.Box(1, 0, 0, 4, 8)], size=(8, 8))
    assert codec.parse(image) == [streams.Box(0, 4, 0, 8, 8), streams.Box(1, 0, 0, 4, 8)]
    for box in (streams.Box(0, 0, 0, 9, 8), streams.Box(0, 3, 3, 3, 4), streams.Box(2, 0, 0, 1, 1)):
        with pytest.raises(UserError):
            codec.draw([box], size=(8, 8))


@pytest.mark.parametrize(
    "codec",
    [
        streams.Image(),
        streams.Palette(("background", "", "cat"), background=0, ignore=2),
        streams.Depth(0, 10000, "mm"),
        streams.Edges(),
        streams.Normals(),
        streams.Boxes(("cat",)),
    ],
    ids=lambda codec: codec.kind,
)
def test_json_round_trip(codec) -> None:
    assert streams.codec_from_json(codec.to_json()) == codec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "flow"}, "'flow'; expected one of image, palette"),
        ({}, "kind None"),
        ({"kind": "depth", "near": 1}, "expected .*near.*far.*unit"),
        ({"kind": "depth", "near": 2, "far": 1, "unit": "m"}, "near < far"),
        ({"kind": "palette", "names": []}, "1 to 256 class names"),
        ({"kind": "palette", "names": ["a"], "ignore": 4}, r"in \[0, 1\)"),
        ({"kind": "edges", "width": 2}, "width"),
    ],
)
def test_bad_json_is_refused_by_name(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        streams.codec_from_json(fields)


def test_parse_refuses_what_is_no_image() -> None:
    with pytest.raises(UserError, match=r"float32 \[2, 2, 3\]; expected uint8"):
        streams.Edges().parse(np.zeros((2, 2, 3), np.float32))


# --- Preprocess: the same geometry for every stream.


@pytest.mark.parametrize("mode", ["squash", "center_crop"])
@pytest.mark.parametrize("size", [(37, 61), (64, 20), (5, 5)])
def test_labels_go_where_images_go(mode, size) -> None:
    ids = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    preprocess = Preprocess(16, mode, "nearest")
    assert preprocess.labels(ids).shape == (16, 16)
    np.testing.assert_array_equal(preprocess.labels(ids), preprocess(ids)[..., 0])


def test_center_crop_is_resize_then_crop() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    resized = PIL.Image.fromarray(photo).resize((40, 20), FILTERS["bicubic"])
    cropped = np.asarray(resized)[:, 10:30].astype(int)
    assert np.abs(Preprocess(20, "center_crop")(photo) - cropped).max() <= 1


def test_every_kind_of_picture_becomes_rgb() -> None:
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


def test_exif_orientation_is_applied() -> None:
    photo = PIL.Image.new("RGB", (4, 2))
    photo.putpixel((0, 0), (255, 0, 0))
    photo.getexif()[0x0112] = 3  # upside down
    assert Preprocess(4, filter="nearest")(photo)[-1, -1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 0}, "positive integer"),
        ({"resolution": 8.0}, "positive integer"),
        ({"resolution": 8, "mode": "pad"}, "squash, center_crop"),
        ({"resolution": 8, "filter": "hamming"}, "bicubic"),
        ({"resolution": 8, "colour": 1}, "expected resolution, mode and filter"),
        ({"mode": "squash"}, "expected resolution"),
    ],
)
def test_bad_preprocess_is_refused(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        Preprocess.from_json(fields)


def test_preprocess_json_round_trip_and_bad_arrays() -> None:
    preprocess = Preprocess(8, "center_crop", "box")
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(UserError, match="expected uint8"):
            preprocess(array)
    with pytest.raises(UserError, match="not empty"):
        preprocess.labels(np.zeros((0, 4)))
