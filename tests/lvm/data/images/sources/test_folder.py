"""Folder source: layouts, annotations, unreadable files, and settings."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.folder import FolderSource
from lvm.data.streams.codecs import PALETTE, Depth, Palette
from tests.commands import SHARED_DATA
from tests.image_files import encode_png, white_is_zero_tiff

needs_dev = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}: real images are not distributed")
exact = Preprocess(8, filter="nearest")


def open_folder(folder: pathlib.Path, preprocess: Preprocess = exact) -> FolderSource:
    return FolderSource(preprocess, path=str(folder))


def save(path: pathlib.Path, pixels: np.ndarray | None = None, mode: str | None = None) -> pathlib.Path:
    """Writes pixels (default: a gray 8 × 8 photo) as an image file, with a palette for mode P."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8, 3), 90, np.uint8) if pixels is None else pixels
    image = PIL.Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(PALETTE.ravel().tolist())
    image.save(path)
    return path


def ids(*values: int) -> np.ndarray:
    """Returns an 8 × 8 map with one column per id, the last one repeated."""
    return np.array([[values[min(x, len(values) - 1)] for x in range(8)]] * 8, np.uint8)


def load_one(folder: pathlib.Path):
    """Parses the annotation in the only frame of the only scene, or returns the failure's reason."""
    source = open_folder(folder)
    scene = source.load(0)
    if scene.failures:
        assert scene.images.shape[0] == scene.info.num_frames == 0
        return scene.failures[0].reason
    return source.streams[scene.info.streams[1]].parse(scene.images[0, 1])


def write_pair(folder: pathlib.Path, stream: str, pixels: np.ndarray, mode: str | None = None) -> pathlib.Path:
    """Writes one photo and its annotation."""
    save(folder / "rgb" / "a.png")
    save(folder / stream / "a.png", pixels, mode)
    return folder


# --- Layouts.


def test_folder_mixes_photos_and_videos(tmp_path) -> None:
    save(tmp_path / "photo10.jpg")
    save(tmp_path / "photo9.png")
    for i in range(1, 13):
        save(tmp_path / "walk" / f"frame{i}.png", np.full((8, 8, 3), i, np.uint8))
    save(tmp_path / ".hidden.jpg")
    save(tmp_path / ".cache" / "a.jpg")
    (tmp_path / "notes.txt").write_text("hello")
    source = open_source(str(tmp_path), exact, {"clip_frames": 5})
    infos = [source.info(i) for i in range(len(source))]
    assert [i.key for i in infos] == [
        "photo9.png",
        "photo10.jpg",
        "walk/clip-0000",
        "walk/clip-0001",
        "walk/clip-0002",
    ]
    assert [i.num_frames for i in infos] == [1, 1, 5, 5, 2]
    assert [i.group for i in infos] == ["photo9.png", "photo10.jpg", "walk", "walk", "walk"]
    assert {i.class_name for i in infos} == {""}
    assert source.load(3).images[:, 0, 0, 0, 0].tolist() == [6, 7, 8, 9, 10]  # natural order
    assert [(f.key, f.reason) for f in source.skipped] == [("notes.txt", "not an image file")]
    assert source.describe()["num_frames"] == 14
    assert str(tmp_path) not in json.dumps(source.describe())


def test_streams_are_siblings_of_rgb(tmp_path) -> None:
    for i in range(3):
        save(tmp_path / "rgb" / "v" / f"{i}.jpg")
        save(tmp_path / "edges" / "v" / f"{i}.png", ids(0, 255))
    for i in range(2):
        save(tmp_path / "depth" / "v" / f"{i}.png", np.full((8, 8), 2000, np.uint16))
    save(tmp_path / "rgb" / "alone.jpg")
    save(tmp_path / "rgb" / "alone.png")
    save(tmp_path / "edges" / "lost.png", ids(0))
    save(tmp_path / "flow" / "v" / "0.png")
    (tmp_path / "v.keypoints.json").write_text("{}")
    source = open_folder(tmp_path)
    assert [source.info(i).key for i in range(2)] == ["alone.jpg", "v/clip-0000"]
    assert source.info(1).streams == ("rgb", "edges")
    assert source.stream_sets == (("rgb",), ("rgb", "edges"))
    assert list(source.streams) == ["rgb", "edges"]
    assert source.load(1).images.shape == (3, 2, 8, 8, 3)
    skipped = {f.key: f.reason for f in source.skipped}
    assert set(skipped) == {"v.keypoints.json", "flow", "rgb/alone.png", "edges/lost.png", "v/clip-0000"}
    assert skipped["v/clip-0000"] == "depth is left out: only 2 of 3 frames have it"
    assert "rgb/lost" in skipped["edges/lost.png"]


def test_streams_share_their_geometry(tmp_path) -> None:
    pattern = np.random.default_rng(0).integers(0, 4, (30, 50), dtype=np.uint8)
    save(tmp_path / "rgb" / "a.png", pattern * 60)
    save(tmp_path / "segmentation" / "a.png", pattern)
    for mode in ("squash", "center_crop"):
        images = open_folder(tmp_path, Preprocess(16, mode, "nearest")).load(0).images[0]
        np.testing.assert_array_equal(images[1], PALETTE[images[0, ..., 0] // 60])


def test_aspect_mismatch_is_a_failure(tmp_path) -> None:
    reason = load_one(write_pair(tmp_path, "segmentation", np.ones((4, 8), np.uint8)))
    assert reason == "segmentation/a.png: 8×4 differs in aspect ratio from its rgb, 8×8"
    halved = write_pair(tmp_path / "b", "segmentation", np.ones((4, 4), np.uint8))
    assert (load_one(halved) == 1).all()


# --- Segmentation.


@pytest.mark.parametrize("mode", ["L", "P"])
def test_gray_and_palette_files_hold_class_ids(tmp_path, mode) -> None:
    np.testing.assert_array_equal(load_one(write_pair(tmp_path, "segmentation", ids(0, 3, 255), mode)), ids(0, 3, 255))


@pytest.mark.parametrize("pixels", [ids(0, 1).astype(bool), ids(0, 255)], ids=["1-bit", "0 and 255"])
def test_binary_masks_are_background_and_foreground(tmp_path, pixels) -> None:
    folder = write_pair(tmp_path, "segmentation", pixels)
    np.testing.assert_array_equal(load_one(folder), ids(0, 1))
    codec = open_folder(folder).streams["segmentation"]
    assert codec == Palette(("background", "foreground"), background=0)


@pytest.mark.parametrize(
    ("classes", "codec"),
    [
        ({"1": "person", "3": "cat"}, Palette(("background", "person", "", "cat"), background=0)),
        ({"0": {"name": "Sky"}, "1": {"name": "Unlabelled"}}, Palette(("Sky", "Unlabelled"), ignore=1)),
        ({"0": "none", "1": "void"}, Palette(("none", "void"), background=0, ignore=1)),
    ],
)
def test_classes_json_names_classes(tmp_path, classes, codec) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    source = open_folder(write_pair(tmp_path, "segmentation", ids(0, 1)))
    assert source.streams["segmentation"] == codec
    np.testing.assert_array_equal(codec.parse(source.load(0).images[0, 1]), ids(0, 1))
    assert source.skipped == ()


@pytest.mark.parametrize(
    "content",
    [
        encode_png(ids(0, 1, 3), 2),
        encode_png(ids(0, 1, 3), 4),
        b"P5 8 8 15\n" + ids(0, 1, 3).tobytes(),
        b"P2 8 8 100\n" + " ".join(map(str, ids(0, 1, 3).ravel())).encode(),
        b"P5 8 8 300\n" + ids(0, 1, 3).astype(">u2").tobytes(),
        white_is_zero_tiff(ids(0, 1, 3)),
    ],
    ids=["2-bit", "4-bit", "pgm", "plain pgm", "pgm of 16 bits", "tiff, white is zero"],
)
def test_class_ids_are_the_samples_of_the_file(tmp_path, content) -> None:
    folder = write_pair(tmp_path, "segmentation", ids(0))
    (folder / "segmentation" / "a.png").write_bytes(content)
    np.testing.assert_array_equal(load_one(folder), ids(0, 1, 3))


def test_four_bit_mask_of_black_and_white_is_a_mask(tmp_path) -> None:
    folder = write_pair(tmp_path, "segmentation", ids(0))
    (folder / "segmentation" / "a.png").write_bytes(encode_png(ids(0, 15), 4))
    np.testing.assert_array_equal(load_one(folder), ids(0, 1))


def test_depth_of_pgm_is_not_scaled_by_its_maximum(tmp_path) -> None:
    folder = write_pair(tmp_path, "depth", np.full((8, 8), 1, np.uint16))
    (folder / "depth" / "a.png").write_bytes(b"P5 8 8 9000\n" + np.full((8, 8), 2500, ">u2").tobytes())
    np.testing.assert_allclose(load_one(folder), 2500, atol=10000 / 508)


def test_unnamed_class_id_is_a_failure(tmp_path) -> None:
    (tmp_path / "classes.json").write_text('{"1": "person"}')
    assert "class ids [7] have no name" in load_one(write_pair(tmp_path, "segmentation", ids(0, 7)))


def test_rgb_segmentation_matches_colors_exactly(tmp_path) -> None:
    classes = {"0": {"name": "sky", "color": [128, 0, 0]}, "1": {"name": "road", "color": [128, 64, 128]}}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    colors = np.array([[128, 0, 0], [128, 64, 128], [128, 64, 129]], np.uint8)
    folder = write_pair(tmp_path, "segmentation", colors[ids(0, 1)])
    np.testing.assert_array_equal(load_one(folder), ids(0, 1))
    save(tmp_path / "segmentation" / "a.png", colors[ids(0, 2)])
    expected = "segmentation/a.png: color (128, 64, 129) is of no class in classes.json"
    assert load_one(folder) == expected


def test_rgb_segmentation_defaults_to_palette_colors(tmp_path) -> None:
    folder = write_pair(tmp_path, "segmentation", PALETTE[ids(0, 5, 200)])
    np.testing.assert_array_equal(load_one(folder), ids(0, 5, 200))


def test_jpeg_segmentation_is_a_failure(tmp_path) -> None:
    save(tmp_path / "rgb" / "a.jpg")
    save(tmp_path / "segmentation" / "a.jpg", ids(0, 1))
    assert "store segmentation as PNG" in load_one(tmp_path)


# --- Depth.


def test_depth_is_in_millimeters(tmp_path) -> None:
    depth = np.array([[0, 65535, 500, 4000, 9000, 9000, 9000, 9000]] * 8, np.uint16)
    parsed = load_one(write_pair(tmp_path, "depth", depth))
    np.testing.assert_allclose(parsed, np.where(depth == 65535, 0, depth), atol=10000 / 508)


def test_streams_json_overrides_codec(tmp_path) -> None:
    write_pair(tmp_path, "depth", np.full((8, 8), 450, np.uint16))
    (tmp_path / "streams.json").write_text('{"depth": {"near": 400, "far": 5000}}')
    assert open_folder(tmp_path).streams["depth"] == Depth(400, 5000, "mm")
    assert abs(load_one(tmp_path) - 450).max() < 10


def test_gray_depth_is_taken_as_rendered(tmp_path) -> None:
    folder = write_pair(tmp_path, "depth", ids(0, 1, 200, 255))
    np.testing.assert_array_equal(open_folder(folder).load(0).images[0, 1, ..., 0], ids(0, 1, 200, 255))
    assert "mode RGB; depth is 16-bit" in load_one(write_pair(tmp_path / "b", "depth", PALETTE[ids(0, 1)]))


# --- Unreadable files and malformed settings.


def test_unreadable_frames_are_dropped_and_listed(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for i in range(5):
        save(tmp_path / "rgb" / "v" / f"{i}.png", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        save(tmp_path / "segmentation" / "v" / f"{i}.png", np.ones((64, 64), np.uint8))
    data = (tmp_path / "rgb/v/1.png").read_bytes()
    (tmp_path / "rgb/v/1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "rgb/v/2.png").write_bytes(b"")
    (tmp_path / "segmentation/v/3.png").write_bytes(b"no image at all")
    scene = open_folder(tmp_path).load(0)
    assert scene.images.shape == (2, 2, 8, 8, 3)
    assert scene.info.num_frames == 2
    assert {f.key for f in scene.failures} == {"v/clip-0000"}
    assert [f.reason for f in scene.failures] == [
        "rgb/v/1.png: truncated",
        "rgb/v/2.png: the file is empty (0 bytes)",
        "segmentation/v/3.png: not an image that can be decoded",
    ]


def test_truncated_photo_leaves_an_empty_scene(tmp_path) -> None:
    data = save(tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data.write_bytes(data.read_bytes()[:-200])
    scene = open_folder(tmp_path).load(0)
    assert scene.images.shape == (0, 1, 8, 8, 3)
    assert scene.failures[0].reason == "a.jpg: truncated"


def test_decompression_bomb_is_refused_by_its_header(tmp_path) -> None:
    save(tmp_path / "good.png")
    PIL.Image.new("1", (8001, 8000)).save(tmp_path / "bomb.png")
    assert open_folder(tmp_path).load(0).failures[0].reason == ("bomb.png: 8001×8000 is more than 64 megapixels")


def test_non_utf8_names_are_skipped(tmp_path) -> None:
    save(tmp_path / "a.png")
    os.mkdir(os.fsencode(tmp_path) + b"/\xe9")
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes((tmp_path / "a.png").read_bytes())
    source = open_folder(tmp_path, Preprocess(8))
    assert len(source) == 1
    assert {failure.key: failure.reason for failure in source.skipped} == {
        "\\udce9": "its name is not UTF-8",
        "caf\\udce9.png": "its name is not UTF-8",
    }


@pytest.mark.parametrize("names", [["1.png", "01.png", "001.png"], ["01.png", "001.png", "1.png"]])
def test_order_is_independent_of_the_disk(tmp_path, monkeypatch, names) -> None:
    for name in names:
        save(tmp_path / name)
    monkeypatch.setattr(os, "walk", lambda top, **options: iter([(str(top), [], list(names))]))
    source = open_folder(tmp_path, Preprocess(8))
    assert [source.info(i).key for i in range(3)] == ["001.png", "01.png", "1.png"]


def test_link_to_parent_does_not_loop(tmp_path) -> None:
    save(tmp_path / "v" / "0.png")
    (tmp_path / "v" / "up").symlink_to(tmp_path)
    source = open_folder(tmp_path)
    assert len(source) == 1
    assert source.skipped[0].key == "v/up"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "found nothing there; expected a folder of images, or a config file"),
        ("a.txt", "found a file there"),
        ("missing.py", "found nothing there"),
        ("empty", "holds no image file; expected a folder of photos"),
        ("broken", "none of its image files can be opened; the last, a.jpg: the file is empty"),
        ("orphans", "holds no image file"),
    ],
)
def test_open_source_names_bad_path(tmp_path, name, message) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"")
    save(tmp_path / "orphans" / "segmentation" / "a.png")
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path / name), exact)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.json", "{", "not readable as JSON"),
        ("classes.json", "[]", "expected an object"),
        ("classes.json", '{"300": "cat"}', r"a class id in \[0, 255\] with its name"),
        ("classes.json", '{"1": {"title": "cat"}}', "with its name"),
        ("classes.json", '{"1": {"name": "cat", "color": [1, 2]}}', "red, green, blue"),
        (
            "classes.json",
            '{"1": {"name": "a", "color": [1, 2, 3]}, "2": {"name": "b", "color": [1, 2, 3]}}',
            "same",
        ),
        ("streams.json", '{"flow": {}}', "'flow' is no stream"),
        ("streams.json", '{"segmentation": 3}', "parameters by name"),
        ("streams.json", '{"segmentation": {"near": 3}}', "near"),
    ],
)
def test_malformed_settings_file_is_named(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_folder(write_pair(tmp_path, "segmentation", ids(0, 1)))
    assert str(tmp_path / name) in str(error.value)


def test_folder_rejects_bad_parameters(tmp_path) -> None:
    save(tmp_path / "a.png")
    for parameters, message in (
        ({"clip_frames": 0}, r"folder\.clip_frames=0"),
        ({"clips": 1}, "clips: no such key"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path), exact, parameters)


# --- Real images.


@needs_dev
@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("bsds", ("rgb", "edges")),
        ("camvid", ("rgb", "segmentation")),
        ("coco", ("rgb", "segmentation")),
        ("davis", ("rgb", "segmentation")),
        ("depth", ("rgb", "depth")),
        ("objects", ("rgb",)),
        ("photos", ("rgb",)),
        ("pose", ("rgb", "pose")),
    ],
)
def test_real_folder_loads(name, streams) -> None:
    source = open_folder(SHARED_DATA / name, Preprocess(64))
    assert source.stream_sets == (streams,)
    for index in (0, len(source) // 2, len(source) - 1):
        scene = source.load(index)
        assert scene.failures == ()
        assert scene.info == source.info(index)
        assert scene.images.shape == (scene.info.num_frames, len(streams), 64, 64, 3)


@needs_dev
def test_real_annotations_parse() -> None:
    camvid = open_folder(SHARED_DATA / "camvid").streams["segmentation"]
    assert (camvid.names[3], camvid.background, camvid.names[camvid.ignore]) == ("Road", None, "Unlabelled")
    coco = open_folder(SHARED_DATA / "coco").streams["segmentation"]
    assert (coco.names[1], coco.names[12], coco.background, coco.ignore) == ("person", "", 0, None)
    depth = open_folder(SHARED_DATA / "depth", Preprocess(64))
    meters = depth.streams["depth"].parse(depth.load(0).images[0, 1]) / 1000
    assert 0.3 < meters[meters > 0].min() < meters.max() < 6
