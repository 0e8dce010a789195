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


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.9, 1])
def test_run_lengths_are_decoded_like_pycocotools(tmp_path, share) -> None:
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < share
    mask[:, 3:50] ^= True  # long runs, too
    counts = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
    source = CocoSource(Preprocess(80), **write(tmp_path, [annotation(1, segmentation=segmentation)]))
    np.testing.assert_array_equal(parsed(source, "segmentation")[::2] == 7, mask)


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


NAN, BIG = float("nan"), 1e300
SIZE = {"size": [HEIGHT, WIDTH]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]; expected 4 numbers"),
        ({"bbox": ["1", "2", "3", "4"]}, r"bbox is \['1', '2', '3', '4'\]"),
        ({"bbox": [NAN, 0, 9, 9]}, r"bbox is \[nan, 0, 9, 9\]"),
        ({"bbox": [0, 0, BIG, 9]}, "bbox is"),
        ({"bbox": [0, 0, 10**400, 9]}, "bbox is"),
        ({"bbox": [0, 0, -9, 9]}, "not negative"),
        ({"bbox": {"x": 1}}, "bbox is"),
        ({"bbox": [0, 0, True, 9]}, "bbox is"),
        ({"bbox": [0, 0, 9, 9], "iscrowd": "0"}, "iscrowd is '0'; expected 0 or 1"),
        ({"bbox": [0, 0, 9, 9], "area": "81"}, "area is '81'; expected a number"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon is"),
        ({"segmentation": [["1", "2", "9", "2", "9", "9"]]}, "a polygon is"),
        ({"segmentation": [[1, 2, 9, 2, 9, NAN]]}, "a polygon is"),
        ({"segmentation": [[1, 2, 9, 2, 9, 1e8]]}, "far outside of the image, 80×40"),
        ({"segmentation": [1, 2, 9, 2, 9, 9]}, "a polygon is 1;"),
        ({"segmentation": "abc"}, "its mask is 'abc'"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"its mask is \[9, 9\], the image \[40, 80\]"),
        ({"segmentation": SIZE | {"counts": [10, 20]}}, "fill 30 of 3200 pixels"),
        ({"segmentation": SIZE | {"counts": [0, 4000]}}, "fill 4000 of 3200 pixels"),
        ({"segmentation": SIZE | {"counts": [3300, -100]}}, "none negative"),
        ({"segmentation": SIZE | {"counts": [3200.0]}}, "none negative"),
        ({"segmentation": SIZE | {"counts": None}}, "counts of its mask are None"),
        ({"segmentation": SIZE | {"counts": "04"}}, "fill 4 of 3200 pixels"),
        ({"segmentation": SIZE | {"counts": "P" * 99}}, "expected COCO's encoding"),
        ({"segmentation": SIZE | {"counts": "\0é"}}, "can't encode"),
        ({"keypoints": [1, 2, 2, 3]}, "expected 9 numbers"),
        ({"keypoints": [1, 2, 2] * 4}, "expected 9 numbers"),
        ({"keypoints": ["1", "2", "2"] * 3}, "expected 9 numbers"),
        ({"keypoints": [NAN, 2, 2] * 3}, "expected 9 numbers"),
        ({"keypoints": [1, 2, 2, 1, 2, 2, 1e8, 2, 2]}, "far outside of the image"),
        ({"keypoints": "abc"}, "keypoints is 'abc'"),
    ],
)
def test_malformed_annotation_is_a_failure(tmp_path, fields, reason) -> None:
    scene = CocoSource(Preprocess(16), **write(tmp_path, [annotation(1, 1, **fields)])).load(0)
    assert len(scene.images) == 0
    (failure,) = scene.failures
    assert failure.key == "a.png"
    assert re.search(f"annotation 1: can't be rendered: .*{reason}", failure.reason)


def test_null_and_unlabeled_fields_are_absent(tmp_path) -> None:
    null = {"bbox": None, "segmentation": None, "keypoints": None, "iscrowd": None, "area": None}
    unlabeled = annotation(2, 1, keypoints=[None, NAN, 0, "?", 0, 0, 20, 10, 2], name="Ann")
    source = CocoSource(Preprocess(40), **write(tmp_path, [annotation(1, 1, **null), unlabeled]))
    assert source.skipped == ()
    assert source.info(0).streams == ("rgb", "pose")
    assert [len(joints) for joints in parsed(source, "pose")] == [0, 0, 1]


def test_polygon_without_area_is_left_out(tmp_path) -> None:
    flat = [[], [1, 2], [1, 2, 30, 30]]
    boxed = annotation(2, bbox=[0, 0, 8, 8], segmentation=flat)
    with_lines = CocoSource(Preprocess(40), **write(tmp_path, [annotation(1, segmentation=[*flat, square(8, 4, 16)])]))
    mask = parsed(with_lines, "segmentation")
    assert [failure.key for failure in with_lines.skipped] == ["annotation 1"]
    assert "3 of its polygons" in with_lines.skipped[0].reason
    whole = CocoSource(Preprocess(40), **write(tmp_path, [annotation(1, segmentation=[square(8, 4, 16)])]))
    np.testing.assert_array_equal(mask, parsed(whole, "segmentation"))
    assert CocoSource(Preprocess(40), **write(tmp_path, [boxed])).info(0).streams == ("rgb", "boxes")


def test_annotations_of_unknown_ids_are_skipped(tmp_path) -> None:
    ids = [(99, 7), ([1], 7), ({}, 7), (None, 7), (1, 99), (1, [7]), (1, None)]
    unknown = [annotation(i, category, image, bbox=[0, 0, 1, 1]) for i, (image, category) in enumerate(ids)]
    unnamed = annotation([1], image=5, bbox=[0, 0, 1, 1])
    source = CocoSource(Preprocess(8), **write(tmp_path, [*unknown, unnamed]))
    assert [failure.key for failure in source.skipped] == [f"annotation {i}" for i in range(7)] + [
        "annotation at index 7"
    ]
    assert source.skipped[1].reason == "its image [1] is not among those used"
    assert source.skipped[5].reason == "its category [7] is not one of the file's"


@pytest.mark.parametrize("file_name", [None, ["a.png"], 7, "", "a\0.png", "\ud800.png"])
def test_image_without_a_usable_name_is_skipped(tmp_path, file_name) -> None:
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(["a.png", file_name])
    ]
    source = CocoSource(Preprocess(8), **write(tmp_path, [], images))
    assert [source.info(i).key for i in range(len(source))] == ["a.png"]
    assert len(source.skipped) == 1
    assert source.describe()


def test_mask_of_a_huge_declared_size_is_a_failure(tmp_path) -> None:
    width, height = WIDTH * 10**6, HEIGHT * 10**6
    images = [{"id": 1, "file_name": "a.png", "width": width, "height": height}]
    mask = {"size": [height, width], "counts": [width * height]}
    (failure,) = (
        CocoSource(Preprocess(8), **write(tmp_path, [annotation(1, segmentation=mask)], images)).load(0).failures
    )
    assert "expected at most 64000000" in failure.reason


PERSON = CATEGORIES[0]


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "categories 'a' and 'b' have the same id 1"),
        ([{"id": [1], "name": "a"}], r"the id \[1\]; expected an integer or a name"),
        ([{"id": 1, "name": None}], "a category has the name None"),
        ([{"id": 1, "name": ""}], "a category has the name ''"),
        ([PERSON | {"keypoints": "nose"}], "'person' has keypoints 'nose'"),
        ([PERSON | {"keypoints": [1, 2, 3]}], r"keypoints \[1, 2, 3\]"),
        ([PERSON | {"skeleton": [[1]]}], r"skeleton \[\[1\]\]"),
        ([PERSON | {"skeleton": 3}], "skeleton 3"),
        ([PERSON | {"skeleton": [[1, 9]]}], "pose.limbs"),
    ],
)
def test_malformed_category_is_named(tmp_path, categories, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        CocoSource(Preprocess(8), **write(tmp_path, [], categories=categories))
    assert "a.json" in str(error.value) or "pose.limbs" in message


def test_numbers_and_names_are_ids(tmp_path) -> None:
    categories = [{"id": "dog", "name": "dog"}, {"id": 3, "name": 3}, PERSON | {"skeleton": None}]
    source = CocoSource(Preprocess(8), **write(tmp_path, [annotation(1, "dog", bbox=[0, 0, 80, 40])], None, categories))
    assert source.streams["boxes"].names == ("person", "3", "dog")
    assert parsed(source, "boxes") == [Box(2, 0, 0, 8, 8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object with lists of objects images, annotations, categories"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "lacks file_name",
        ),
        ("[" * 100_000, "not readable as JSON"),
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


def test_joints_lie_at_the_centers_of_pixels(tmp_path) -> None:
    people = annotation(1, 1, keypoints=[20, 10, 2, 60, 30, 1, 0, 0, 0])
    enlarged = CocoSource(Preprocess(320), **write(tmp_path, [people]))  # 4 × 8 pixels for each
    nose, left, _ = parsed(enlarged, "pose")
    np.testing.assert_allclose([nose[0], left[0]], [[82, 84], [242, 244]], atol=1)
