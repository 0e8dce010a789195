"""COCO source: boxes, masks and keypoints follow the image's geometry; malformed data is listed."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pycocotools.mask
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.coco import CocoSource
from lvm.data.streams.codecs import PALETTE, Box
from tests.image_files import encode_image, photo

WIDTH, HEIGHT = 80, 40
CATEGORIES = [
    {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]},
    {"id": 7, "name": "train"},
]


def square(x: float, y: float, size: float) -> list[float]:
    return [x, y, x + size, y, x + size, y + size, x, y + size]


def annotation(number: int, category: int = 7, image: int = 1, **fields) -> dict:
    return {"id": number, "image_id": image, "category_id": category} | fields


def write(folder: pathlib.Path, annotations: list[dict], images=None, categories=None) -> dict[str, str]:
    """Writes a dataset of one photo a.png with these annotations; returns its source's parameters."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.png").write_bytes(encode_image(photo(WIDTH, HEIGHT)))
    images = images or [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    content = {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}
    (folder / "a.json").write_text(json.dumps(content))
    return {"annotations": str(folder / "a.json"), "images": str(folder / "images")}


def parsed(source: CocoSource, stream: str):
    scene = source.load(0)
    assert scene.failures == ()
    return source.streams[stream].parse(scene.images[0, scene.info.streams.index(stream)])


def test_boxes_follow_the_resize(tmp_path) -> None:
    boxes = [
        annotation(1, bbox=[8, 4, 16, 8]),
        annotation(2, 1, bbox=[60, 20, 20, 20]),
        annotation(3, bbox=[30, 10, 40, 20], iscrowd=1),
    ]
    parameters = write(tmp_path, boxes)
    squashed = CocoSource(Preprocess(20), **parameters)
    assert squashed.info(0).streams == ("rgb", "boxes")
    assert parsed(squashed, "boxes") == [Box(0, 15, 10, 20, 20), Box(6, 2, 2, 6, 6)]
    cropped = CocoSource(Preprocess(20, "center_crop"), **parameters)  # keeps x in [20, 60)
    assert parsed(cropped, "boxes") == [Box(6, 0, 2, 2, 6)]
    image = squashed.load(0).images[0, 1]
    assert (image[3, 3] == PALETTE[7]).all()  # a class has the color of its category's id


def test_smaller_copy_of_an_image_has_the_same_annotations(tmp_path) -> None:
    parameters = write(tmp_path, [annotation(1, bbox=[8, 4, 16, 8], segmentation=[square(8, 4, 16)])])
    whole = CocoSource(Preprocess(20), **parameters).load(0).images
    (tmp_path / "images" / "a.png").write_bytes(encode_image(photo(WIDTH // 2, HEIGHT // 2)))
    np.testing.assert_array_equal(CocoSource(Preprocess(20), **parameters).load(0).images[:, 1:], whole[:, 1:])


def test_smaller_objects_are_rendered_over_larger_ones(tmp_path) -> None:
    inner, outer = annotation(1, 1, bbox=[20, 10, 10, 10]), annotation(2, bbox=[0, 0, 80, 40])
    for order in ([inner, outer], [outer, inner]):
        boxes = parsed(CocoSource(Preprocess(40), **write(tmp_path, order)), "boxes")
        assert Box(0, 10, 10, 15, 20) in boxes


def test_polygons_and_rle_give_the_same_mask(tmp_path) -> None:
    polygon = [square(20, 10, 20), square(60, 30, 8)]
    encoded_mask = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygon, HEIGHT, WIDTH))
    mask = pycocotools.mask.decode(encoded_mask)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [0]])))
    counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
    text = {"size": [HEIGHT, WIDTH], "counts": encoded_mask["counts"].decode()}
    maps = []
    for segmentation in (polygon, text, {"size": [HEIGHT, WIDTH], "counts": counts}):
        source = CocoSource(Preprocess(40), **write(tmp_path, [annotation(1, segmentation=segmentation)]))
        maps.append(parsed(source, "segmentation"))
    np.testing.assert_array_equal(maps[1], maps[2])
    assert (maps[0] != maps[1]).mean() < 0.01
    expected = np.zeros((40, 40), int)
    expected[10:30, 10:20] = expected[30:38, 30:34] = 7
    np.testing.assert_array_equal(maps[1], expected)


def test_keypoints_become_joints(tmp_path) -> None:
    people = annotation(1, 1, keypoints=[20, 10, 2, 60, 10, 1, 0, 0, 0], num_keypoints=2)
    source = CocoSource(Preprocess(40), **write(tmp_path, [people]), radius=2)
    codec = source.streams["pose"]
    assert codec.joints == ("nose", "left eye", "right eye")
    assert (codec.limbs, codec.radius) == ((0, 1, 0, 2), 2)
    nose, left, right = parsed(source, "pose")
    assert np.abs(nose - [[10.25, 10.5]]).max() <= 0.5
    assert np.abs(left - [[30.25, 10.5]]).max() <= 0.5
    assert len(right) == 0


def test_scene_has_the_streams_of_its_annotations(tmp_path) -> None:
    images = [
        {"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in ((1, "a.png"), (2, "b.png"))
    ]
    annotations = [annotation(1, 1, bbox=[1, 1, 9, 9], segmentation=[square(1, 1, 9)], keypoints=[5, 5, 2] * 3)]
    parameters = write(tmp_path, annotations, images)
    (tmp_path / "images" / "b.png").write_bytes(encode_image(photo(WIDTH, HEIGHT)))
    source = CocoSource(Preprocess(32), **parameters)
    assert source.stream_sets == (("rgb",), ("rgb", "segmentation", "boxes", "pose"))
    assert source.load(0).images.shape == (1, 4, 32, 32, 3)
    assert source.load(1).images.shape == (1, 1, 32, 32, 3)
    chosen = CocoSource(Preprocess(32), **parameters, streams=("boxes",), categories=("person",))
    assert chosen.stream_sets == (("rgb",), ("rgb", "boxes"))
    assert CocoSource(Preprocess(32), **parameters, categories=("train",)).stream_sets == (("rgb",),)


@pytest.mark.parametrize("height", [None, 0, "tall"])
def test_image_without_size_is_skipped(tmp_path, height) -> None:
    images = [
        {"id": number, "file_name": f"{name}.png", "width": WIDTH, "height": of}
        for number, (name, of) in enumerate([("a", HEIGHT), ("b", height)], 1)
    ]
    source = CocoSource(Preprocess(8), **write(tmp_path, [annotation(1, bbox=[1, 1, 9, 9])], images))
    assert [source.info(i).key for i in range(len(source))] == ["a.png"]
    (failure,) = source.skipped
    assert (failure.key, failure.reason) == (
        "b.png",
        f"its size is 80×{height!r}; expected two positive numbers",
    )


def test_large_category_ids_are_ranked(tmp_path) -> None:
    categories = [{"id": 9000, "name": "b"}, {"id": 300, "name": "a"}]
    parameters = write(tmp_path, [annotation(1, 9000, bbox=[0, 0, 80, 40])], categories=categories)
    source = CocoSource(Preprocess(8), **parameters)
    assert source.streams["boxes"].names == ("a", "b")
    assert parsed(source, "boxes") == [Box(1, 0, 0, 8, 8)]
    many = [{"id": n, "name": str(n)} for n in range(1000, 1256)]
    with pytest.raises(UserError, match="256 categories; at most 255 have a color"):
        CocoSource(Preprocess(8), **write(tmp_path, [], categories=many))


def test_inconsistent_entries_are_skipped(tmp_path) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 1, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 3, "file_name": "../a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 4, "file_name": "missing.png", "width": WIDTH, "height": HEIGHT},
        {"id": 5, "file_name": "other.png", "width": HEIGHT, "height": WIDTH},
    ]
    parameters = write(tmp_path, [annotation(1, image=99, bbox=[0, 0, 1, 1])], images)
    (tmp_path / "images" / "other.png").write_bytes(encode_image(photo(WIDTH, HEIGHT)))
    source = CocoSource(Preprocess(16), **parameters)
    assert {failure.key: failure.reason for failure in source.skipped} == {
        "b.png": "its id 1 or its file is that of an earlier image",
        "a.png": "its id 2 or its file is that of an earlier image",
        "../a.png": "its name leaves the folder of images",
        "annotation 1": "its image 99 is not among those used",
    }
    assert [source.info(i).key for i in range(len(source))] == ["a.png", "missing.png", "other.png"]
    assert source.load(0).failures == ()
    for index, reason in (
        (1, "missing.png: cannot be opened"),
        (2, "80×40 differs in aspect ratio from its annotations, 40×80"),
    ):
        scene = source.load(index)
        assert scene.images.shape == (0, 1, 16, 16, 3)
        assert reason in scene.failures[0].reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bbox": [1, 2, 3]}, "annotation 1: can't be rendered"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 1: can't be rendered"),
        (
            {"segmentation": {"size": [9, 9], "counts": [81]}},
            r"its mask is \[9, 9\], the image \[40, 80\]",
        ),
        ({"keypoints": [1, 2, 2, 3]}, "annotation 1: can't be rendered"),
    ],
)
def test_malformed_annotation_is_a_failure(tmp_path, fields, reason) -> None:
    scene = CocoSource(Preprocess(16), **write(tmp_path, [annotation(1, 1, **fields)])).load(0)
    assert len(scene.images) == 0
    (failure,) = scene.failures
    assert failure.key == "a.png"
    assert re.search(reason, failure.reason)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object with lists of objects images, annotations, categories"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "lacks file_name",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable image"),
    ],
)
def test_malformed_json_is_named(tmp_path, content, message) -> None:
    parameters = write(tmp_path, [])
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        CocoSource(Preprocess(8), **parameters)
    assert "a.json" in str(error.value)


def test_coco_rejects_bad_parameters(tmp_path) -> None:
    dataset = write(tmp_path, [annotation(1, bbox=[0, 0, 1, 1])])
    for parameters, message in (
        ({"streams": ("depth",)}, "expected some of segmentation, boxes, pose"),
        ({"categories": ("dog",)}, "'dog' is not in"),
        ({"images": str(tmp_path / "nowhere")}, "no such folder"),
        ({"images": ""}, r"coco\.images is missing"),
    ):
        with pytest.raises(UserError, match=message):
            CocoSource(Preprocess(8), **(dataset | parameters))
    with pytest.raises(UserError, match=r"no category of .* has keypoints"):
        CocoSource(Preprocess(8), **write(tmp_path, [], categories=[CATEGORIES[1]]), streams=("pose",))


def test_config_file_with_derived_streams(tmp_path) -> None:
    parameters = write(tmp_path, [annotation(1, bbox=[0, 0, 40, 40])])
    config = tmp_path / "source.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(dict(kind='coco', derived=('masked',), **{parameters!r}))\n"
    )
    source = open_source(str(config), Preprocess(16))
    assert source.load(0).info.streams == ("rgb", "boxes", "masked")
    assert str(tmp_path) not in json.dumps(source.describe())
