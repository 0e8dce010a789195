"""Stream codecs: parsing inverts rendering within the stated error; mirroring; JSON."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common.errors import UserError
from lvm.data.images.augment import mirror_images
from lvm.data.streams import codecs

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
names = st.integers(1, 255).map(lambda n: tuple(f"class {i}" for i in range(n)))
quick = settings(max_examples=40, deadline=None)


def unit_vectors(shape: tuple[int, ...], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(*shape, 3))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_palette_colors_are_distinct_and_first_far_apart() -> None:
    colors = codecs.PALETTE.astype(int)
    distance = ((colors[:, None] - colors) ** 2).sum(-1)
    np.fill_diagonal(distance, distance.max())
    assert colors.shape == (256, 3)
    assert colors[:3].tolist() == [[0, 0, 0], [255, 255, 255], [0, 128, 255]]
    assert distance.min() >= 31**2
    assert distance[:8, :8].min() >= 179**2


@quick
@given(data=st.data(), names=names, shape=shapes)
def test_palette_round_trips_exactly(data, names, shape) -> None:
    ids = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, len(names) - 1)))
    codec = codecs.Palette(names)
    np.testing.assert_array_equal(codec.parse(codec.render(ids)), ids)


@quick
@given(seed=st.integers(0, 99), shape=shapes)
def test_palette_parses_noise_below_half_the_color_distance(seed, shape) -> None:
    rng = np.random.default_rng(seed)
    codec = codecs.Palette(tuple("abcdefgh"))
    ids = rng.integers(0, 8, shape)
    noisy = codec.render(ids) + rng.integers(-50, 51, (*shape, 3))  # 50 · √3 < 179 / 2
    np.testing.assert_array_equal(codec.parse(noisy.clip(0, 255).astype(np.uint8)), ids)


def test_palette_never_uses_unnamed_ids() -> None:
    codec = codecs.Palette(("none", "", "cat"), background=0)
    almost_the_unnamed = np.full((1, 1, 3), 254, np.uint8)
    assert codec.parse(almost_the_unnamed)[0, 0] != 1
    with pytest.raises(UserError, match=r"class ids \[1, 7\] have no name"):
        codec.render(np.array([[0, 1, 2, 7]]))


@quick
@given(
    data=st.data(),
    shape=shapes,
    near=st.integers(0, 1000),
    extent=st.integers(1, 10000),
)
def test_depth_round_trips_within_half_a_level(data, shape, near, extent) -> None:
    codec = codecs.Depth(near, near + extent, "mm")
    inside = st.floats(max(near, 1e-6), near + extent)
    depth = data.draw(hnp.arrays(np.float64, shape, elements=st.just(0.0) | inside))
    parsed = codec.parse(codec.render(depth))
    np.testing.assert_array_equal(parsed == 0, depth == 0)
    assert parsed.dtype == np.float32
    np.testing.assert_allclose(parsed, depth, rtol=1e-5, atol=extent / 508 * 1.001)


def test_depth_levels() -> None:
    codec = codecs.Depth(100, 354, "mm")
    image = codec.render(np.array([[0.0, 1.0, 100.0, 101.0, 354.0, 9999.0]]))
    assert image[0, :, 0].tolist() == [0, 255, 255, 254, 1, 1]
    with pytest.raises(UserError, match="NaN"):
        codec.render(np.array([[np.nan]]))


@quick
@given(strength=hnp.arrays(np.float32, shapes, elements=st.floats(0, 1, width=32)))
def test_edges_round_trip_within_half_a_level(strength) -> None:
    codec = codecs.Edges()
    np.testing.assert_allclose(codec.parse(codec.render(strength)), strength, atol=1 / 510 + 1e-6)


@quick
@given(seed=st.integers(0, 999), shape=shapes)
def test_normals_round_trip_and_mirror(seed, shape) -> None:
    codec, normals = codecs.Normals(), unit_vectors(shape, seed)
    parsed = codec.parse(codec.render(normals))
    np.testing.assert_allclose(parsed, normals, atol=0.01)
    mirrored = mirror_normals(normals)
    # The level of −x is 255 minus the level of x.
    np.testing.assert_allclose(codec.render(mirrored)[..., 0], 255 - codec.render(normals)[:, ::-1, 0], atol=1)


@quick
@given(seed=st.integers(0, 999), count=st.integers(0, 9))
def test_separate_boxes_round_trip_exactly(seed, count) -> None:
    rng = np.random.default_rng(seed)
    codec, boxes = codecs.Boxes(("a", "b", "c")), []
    for cell in rng.permutation(9)[:count]:  # one box in each 8 × 8 cell, never touching the next
        y, x = divmod(int(cell), 3)
        (x0, x1), (y0, y1) = (np.sort(rng.choice(7, 2, replace=False)) for _ in range(2))
        boxes.append(codecs.Box(int(rng.integers(3)), 8 * x + x0, 8 * y + y0, 8 * x + x1, 8 * y + y1))
    assert sorted(codec.parse(codec.render(boxes, size=(24, 24)))) == sorted(boxes)


def test_later_boxes_cover_earlier_ones_and_must_be_inside() -> None:
    codec = codecs.Boxes(("a", "b"))
    image = codec.render([codecs.Box(0, 0, 0, 8, 8), codecs.Box(1, 0, 0, 4, 8)], size=(8, 8))
    assert codec.parse(image) == [codecs.Box(0, 4, 0, 8, 8), codecs.Box(1, 0, 0, 4, 8)]
    for box in (codecs.Box(0, 0, 0, 9, 8), codecs.Box(0, 3, 3, 3, 4), codecs.Box(2, 0, 0, 1, 1)):
        with pytest.raises(UserError):
            codec.render([box], size=(8, 8))


POSE_OF_ONE = codecs.Pose(("nose", "chin"), limbs=(0, 1))


@pytest.mark.parametrize(
    "codec",
    [
        codecs.Image(),
        codecs.Palette(("background", "", "cat"), background=0, ignore=2),
        codecs.Depth(0, 10000, "mm"),
        codecs.Edges(),
        codecs.Normals(),
        codecs.Boxes(("cat",)),
        POSE_OF_ONE,
    ],
    ids=lambda codec: codec.kind,
)
def test_json_round_trip(codec) -> None:
    assert codecs.codec_from_json(codec.to_json()) == codec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "flow"}, "kind='flow' .*image, palette"),
        ({}, "kind=None"),
        ({"kind": "depth", "near": 1}, "expected .*near.*far.*unit"),
        ({"kind": "depth", "near": 2, "far": 1, "unit": "m"}, "near=2"),
        ({"kind": "palette", "names": []}, "palette.names=.* 1 to 256"),
        ({"kind": "palette", "names": ["a"], "ignore": 4}, r"palette\.ignore=4 .*\[0, 1\)"),
        ({"kind": "edges", "width": 2}, "width"),
    ],
)
def test_codec_from_json_raises_with_the_field(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        codecs.codec_from_json(fields)


def test_parse_raises_unless_uint8_image() -> None:
    with pytest.raises(UserError, match=r"float32 \[2, 2, 3\]; expected uint8"):
        codecs.Edges().parse(np.zeros((2, 2, 3), np.float32))


# --- Poses


JOINTS = ("nose", "left hand", "right hand", "left foot", "right foot")
POSE = codecs.Pose(JOINTS, limbs=(0, 1, 0, 2, 1, 3, 2, 4), radius=2)


def separate_joints(seed: int, people: int) -> np.ndarray:
    """Joints [P, 5, 2], some unseen, with discs inside an image of 64 × 64 that don't touch."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(64)[: people * len(JOINTS)]  # of 8 × 8 pixels; a disc takes 5 of the first 7
    corners = np.stack([cells % 8, cells // 8], -1) * 8 + rng.uniform(2, 5, (len(cells), 2))
    joints = corners.reshape(people, len(JOINTS), 2)
    joints[rng.random((people, len(JOINTS))) < 0.2] = np.nan
    return joints


@quick
@given(seed=st.integers(0, 999), people=st.integers(0, 6))
def test_separate_joints_round_trip_within_half_a_pixel(seed, people) -> None:
    joints = separate_joints(seed, people)
    for joint, parsed in enumerate(POSE.parse(POSE.render(joints, size=(64, 64)))):
        expected = joints[:, joint][~np.isnan(joints[:, joint]).any(-1)]
        assert parsed.shape == expected.shape
        order, parsed_order = np.lexsort(np.floor(expected).T), np.lexsort(np.floor(parsed).T)
        np.testing.assert_allclose(parsed[parsed_order], expected[order], atol=0.5)


def test_limbs_are_white_lines_under_the_joints() -> None:
    joints = np.full((1, 5, 2), np.nan)
    joints[0, 0], joints[0, 1] = (10.5, 10.5), (30.5, 10.5)
    image = POSE.render(joints, size=(20, 40))
    assert image[10, 20].tolist() == [255, 255, 255]
    assert image[10, 10].tolist() == codecs.PALETTE[2].tolist()
    assert (image > 0).any(-1).sum() == 2 * 13 + 15  # two discs, and the line between them


def test_impossible_pose_raises() -> None:
    with pytest.raises(UserError, match=r"shape \[1, 4, 2\]; expected \[P, 5, 2\]"):
        POSE.render(np.zeros((1, 4, 2)), size=(8, 8))
    for fields in ({"limbs": (0, 5)}, {"limbs": (0,)}, {"radius": 0}, {"joints": ()}):
        with pytest.raises(UserError, match=r"pose\.(limbs|radius|joints)"):
            codecs.Pose(**{"joints": JOINTS, **fields})


# --- Mirroring


def mirror_normals(normals: np.ndarray) -> np.ndarray:
    return normals[:, ::-1] * np.array([-1, 1, 1], normals.dtype)


@quick
@given(seed=st.integers(0, 999))
def test_mirrored_image_is_of_the_mirrored_scene(seed) -> None:
    rng = np.random.default_rng(seed)
    palette, depth = codecs.Palette(("a", "b", "c")), codecs.Depth(0, 100, "m")
    ids, readings = rng.integers(0, 3, (6, 9)), rng.uniform(0, 100, (6, 9))
    np.testing.assert_array_equal(palette.parse(palette.mirror(palette.render(ids))), ids[:, ::-1])
    np.testing.assert_array_equal(depth.mirror(depth.render(readings)), depth.render(readings[:, ::-1]))
    codec, normals = codecs.Normals(), unit_vectors((6, 9), seed)
    mirrored = codec.mirror(codec.render(normals))
    np.testing.assert_allclose(mirrored.astype(int), codec.render(mirror_normals(normals)), atol=1)
    boxes = codecs.Boxes(("x", "y"))
    mirrored = boxes.mirror(boxes.render([codecs.Box(1, 1, 2, 4, 5)], size=(6, 9)))
    assert boxes.parse(mirrored) == [codecs.Box(1, 5, 2, 8, 5)]
    joints = separate_joints(seed, 2)
    parsed = POSE.parse(POSE.mirror(POSE.render(joints, (64, 64))))
    for joint, counterpart in enumerate([0, 2, 1, 4, 3]):  # left and right are swapped
        expected = [64, 0] + joints[:, counterpart] * [-1, 1]
        expected = expected[~np.isnan(expected).any(-1)]
        assert len(parsed[joint]) == len(expected)
        assert all(np.abs(parsed[joint] - point).max(-1).min() <= 0.5 + 1e-9 for point in expected)


def test_mirrored_left_hand_is_a_right_hand() -> None:
    joints = np.full((1, 5, 2), np.nan)
    joints[0, 1] = (8.5, 20.5)
    parsed = POSE.parse(POSE.mirror(POSE.render(joints, (64, 64))))
    assert [len(points) for points in parsed] == [0, 0, 1, 0, 0]
    np.testing.assert_allclose(parsed[2], [[55.5, 20.5]])


def test_mirror_images_mirrors_all_frames_and_streams() -> None:
    rng = np.random.default_rng(0)
    stream_codecs = [codecs.Image(), codecs.Normals()]
    images = rng.integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
    mirrored = mirror_images(images, stream_codecs)
    assert (mirrored.shape, mirrored.dtype) == (images.shape, np.uint8)
    for frame in range(3):
        for column, codec in enumerate(stream_codecs):
            np.testing.assert_array_equal(mirrored[frame, column], codec.mirror(images[frame, column]))
    np.testing.assert_array_equal(mirror_images(mirrored, stream_codecs), images)
