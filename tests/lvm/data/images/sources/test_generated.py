"""Generated source: scenes are pure functions of (seed, index), with exact annotations."""

from __future__ import annotations

import colorsys
import json
import time

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.generated import CODECS, GeneratedSource
from lvm.data.images.sources.shapes import BACKGROUND_DEPTH, CLASSES, TEXTURES, render, sample_scene
from tests.commands import ROOT

ALL = tuple(CODECS)
DEMO = ROOT / "configs" / "demo_scenes.py"


def parsed(source: GeneratedSource, index: int) -> dict[str, list]:
    """Parses each stream's annotations frame by frame."""
    images = source.load(index).images
    streams = source.config.streams
    return {s: [source.streams[s].parse(frame) for frame in images[:, i]] for i, s in enumerate(streams)}


def test_scene_is_a_pure_function_of_seed_and_index() -> None:
    first, again = (GeneratedSource(Preprocess(32), num_scenes=9, streams=ALL) for _ in range(2))
    np.testing.assert_array_equal(first.load(3).images, again.load(3).images)
    assert first.load(3).info == again.info(3)
    shorter = GeneratedSource(Preprocess(32), num_frames=3, streams=("rgb",)).load(3).images
    np.testing.assert_array_equal(shorter[:, 0], first.load(3).images[:3, 0])
    other = GeneratedSource(Preprocess(32), seed=1, streams=ALL)
    assert (other.load(3).images != first.load(3).images).any()
    assert (first.load(4).images != first.load(3).images).any()


@pytest.mark.parametrize("resolution", [16, 33, 64])
def test_generated_shapes_names_and_description(resolution) -> None:
    source = GeneratedSource(Preprocess(resolution), num_scenes=5, num_frames=2, streams=ALL)
    scene = source.load(4)
    assert scene.images.shape == (2, len(ALL), resolution, resolution, 3)
    assert scene.images.dtype == np.uint8
    assert scene.failures == ()
    assert scene.info == source.info(4)
    assert scene.info.key == scene.info.group == "generated-0-000004"
    assert scene.info.class_name in source.classes == tuple(sorted(CLASSES))
    assert source.stream_sets == (ALL,)
    assert json.loads(json.dumps(source.describe())) == source.describe()
    with pytest.raises(IndexError):
        source.load(5)


def test_generated_streams_are_consistent() -> None:
    source = GeneratedSource(Preprocess(64), num_frames=4, streams=ALL)
    top_to_bottom = np.linspace(*BACKGROUND_DEPTH, 64)[:, None]
    step = (source.streams["depth"].far - source.streams["depth"].near) / 254
    for index in range(6):
        maps = parsed(source, index)
        for t in range(4):
            ids, depth = maps["segmentation"][t], maps["depth"][t]
            plane = np.abs(depth - top_to_bottom) < step
            np.testing.assert_array_equal(ids == 0, plane)
            assert (depth[ids > 0] < 5.5).all()
            # Where the class changes there is an edge.
            change = ids[:, 1:] != ids[:, :-1]
            assert np.maximum(maps["edges"][t][:, 1:], maps["edges"][t][:, :-1])[change].min() > 0.8
            flat = (maps["normals"][t] * [0, -0.5, 0.75**0.5]).sum(-1) > 0.999
            assert flat[ids == 0].all()
            boxed = np.zeros((64, 64), bool)
            for box in maps["boxes"][t]:
                boxed[box.y0 : box.y1, box.x0 : box.x1] = True
            assert boxed[ids > 0].all()


def test_recolored_segmentation_has_the_same_classes_in_other_colors() -> None:
    streams = ("rgb", "segmentation", "segmentation_1", "segmentation_119")
    source = GeneratedSource(Preprocess(32), num_frames=2, streams=streams)
    for index in range(6):
        maps, images = parsed(source, index), source.load(index).images
        named = {s: np.array(source.streams[s].names)[np.stack(maps[s])] for s in streams[1:]}
        np.testing.assert_array_equal(named["segmentation_1"], named["segmentation"])
        np.testing.assert_array_equal(named["segmentation_119"], named["segmentation"])
        background = named["segmentation"] == "background"
        np.testing.assert_array_equal(images[:, 3][background], images[:, 1][background])
        assert (images[:, 3] == images[:, 1]).all(-1)[named["segmentation"] == CLASSES[2]].all()  # the middle of five
        assert (images[:, 3] != images[:, 1]).any(-1)[named["segmentation"] == CLASSES[0]].all()
        alone = source.load_image(index, 1, "segmentation_119", Preprocess(32))
        np.testing.assert_array_equal(alone, images[1, 3])
    assert source.streams["segmentation_119"].names == ("background", *reversed(CLASSES))


def test_mask_shows_the_shapes_of_the_scenes_class() -> None:
    source = GeneratedSource(Preprocess(32), num_frames=2, streams=("segmentation", "mask"))
    for index in range(6):
        maps = parsed(source, index)
        label = 1 + CLASSES.index(source.info(index).class_name)
        np.testing.assert_array_equal(np.stack(maps["mask"]), np.stack(maps["segmentation"]) == label)
        assert np.stack(maps["mask"]).any()


def test_number_of_shapes_is_as_configured() -> None:
    source = GeneratedSource(Preprocess(32), num_frames=1, streams=("boxes",), shapes=(1, 2))
    assert {len(parsed(source, index)["boxes"][0]) for index in range(30)} == {1, 2}
    default, explicit = (GeneratedSource(Preprocess(32), streams=("rgb",), **x) for x in ({}, {"shapes": (2, 4)}))
    np.testing.assert_array_equal(default.load(3).images, explicit.load(3).images)


def test_class_hues_tell_the_class_and_change_nothing_else() -> None:
    for index in range(40):
        plain, colored = (sample_scene(np.random.default_rng(index), class_hues=value) for value in (False, True))
        for a, b in zip(plain.shapes, colored.shapes, strict=True):
            assert (a.class_id, a.radius, a.angle, a.texture.pattern) == (
                b.class_id,
                b.radius,
                b.angle,
                b.texture.pattern,
            )
            hues = [colorsys.rgb_to_hsv(*color.tolist())[0] * len(CLASSES) for color in b.texture.colors]
            assert [int(hue) for hue in hues] == [b.class_id] * 2
        np.testing.assert_array_equal(plain.background.colors, colored.background.colors)
    source = GeneratedSource(Preprocess(32), streams=("rgb",), class_hues=True)
    assert (source.load(0).images != GeneratedSource(Preprocess(32), streams=("rgb",)).load(0).images).any()
    assert source.describe()["class_hues"]


def test_front_shape_gives_the_class_and_is_visible() -> None:
    scene = sample_scene(np.random.default_rng(0))
    depths = [shape.depth for shape in scene.shapes]
    assert depths == sorted(depths, reverse=True)
    alone = type(scene)(scene.shapes[-1:], scene.background)
    whole = render(scene, 4, 48, ())["front"] == len(scene.shapes)
    np.testing.assert_array_equal(whole, render(alone, 4, 48, ())["front"] == 1)
    info = GeneratedSource(Preprocess(48)).info(0)
    first = sample_scene(np.random.default_rng([0, 0]))
    assert info.class_name == CLASSES[first.shapes[-1].class_id]


def test_rgb_is_the_same_at_every_resolution() -> None:
    fine = GeneratedSource(Preprocess(128), num_frames=1, streams=("rgb",)).load(2).images[0, 0].astype(float)
    coarse = GeneratedSource(Preprocess(32), num_frames=1, streams=("rgb",)).load(2).images[0, 0]
    pooled = fine.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(pooled - coarse).mean() < 3


def test_generated_scene_statistics() -> None:
    source = GeneratedSource(Preprocess(64), num_frames=8, streams=("rgb", "segmentation"))
    scenes = [source.load(i) for i in range(120)]
    foreground = np.mean([scene.images[:, 1].any(-1).mean() for scene in scenes])
    assert 0.2 <= foreground <= 0.25
    assert {scene.info.class_name for scene in scenes} == set(CLASSES)
    for scene in scenes:  # something moves, but most pixels stay as they are
        change = np.abs(np.diff(scene.images[:, 0].astype(int), axis=0)).max(-1) > 16
        assert 0.005 < change.mean() < 0.5


def test_every_class_occurs_with_every_texture() -> None:
    rng = np.random.default_rng(1)
    seen = {(s.class_id, s.texture.pattern) for _ in range(300) for s in sample_scene(rng).shapes}
    assert len(seen) == len(CLASSES) * len(TEXTURES)


def test_surfaces_have_the_given_textures() -> None:
    def patterns(textures: tuple[str, ...]) -> list[str]:
        rng = np.random.default_rng(1)
        scenes = [sample_scene(rng, textures=textures) for _ in range(300)]
        return [
            surface.pattern for scene in scenes for surface in (scene.background, *(s.texture for s in scene.shapes))
        ]

    assert set(patterns(("plain",))) == {"plain"}
    assert set(patterns(("dots", "checks"))) == {"dots", "checks"}
    assert 0.45 < np.mean(np.array(patterns(("checks", "plain"))) == "plain") < 0.55
    assert 0.45 < np.mean(np.array(patterns(TEXTURES)) == "plain") < 0.55
    plain = GeneratedSource(Preprocess(16), num_scenes=2, textures=("plain",))
    assert plain.describe()["textures"] == ["plain"]
    assert "textures" not in GeneratedSource(Preprocess(16), num_scenes=2).describe()


@pytest.mark.alone  # the speed of the machine decides, too
def test_rendering_takes_under_8_ms() -> None:
    source = GeneratedSource(Preprocess(64))
    source.load(0)

    def seconds(index: int) -> float:
        start = time.process_time()
        source.load(index)
        return time.process_time() - start

    # The minimum of many runs: other processes only add time.
    assert min(seconds(i) for i in range(1, 30)) < 0.008


def test_demo_config_opens() -> None:
    source = open_source(str(DEMO), Preprocess(64))
    assert len(source) == 1500
    assert tuple(source.streams) == ("rgb", "segmentation", "depth", "edges")
    assert len(open_source(str(DEMO), Preprocess(64), {"num_scenes": 7})) == 7


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_scenes": 0}, r"generated\.num_scenes=0"),
        ({"num_frames": 2.0}, r"generated\.num_frames: 2\.0"),
        ({"streams": ("rgb", "flow")}, "expected some of rgb, segmentation"),
        ({"streams": ()}, "expected some of"),
        ({"streams": ("rgb", "segmentation_120")}, "segmentation_1 to segmentation_119"),
        ({"streams": ("rgb", "segmentation_0")}, "expected some of"),
        ({"shapes": (0, 2)}, r"shapes: \(0, 2\); expected the fewest and the most shapes of a scene, from 1 to 7"),
        ({"shapes": (1, 8)}, r"shapes: \(1, 8\)"),
        ({"shapes": (3, 2)}, r"shapes: \(3, 2\)"),
        ({"streams": ("rgb", "rgb")}, "each once"),
        (
            {"textures": ("plain", "wood")},
            r"textures: \('plain', 'wood'\); expected some of plain, stripes, checks, dots",
        ),
        ({"textures": ()}, "textures: "),
        ({"textures": ("dots", "dots")}, "each once"),
        ({"color": 3}, r"generated\.color: no such key"),
    ],
)
def test_generated_rejects_bad_parameters(parameters, message) -> None:
    with pytest.raises(UserError, match=message):
        GeneratedSource(Preprocess(16), **parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return {'kind': 'flow'}", "kind is 'flow'; it must be one of generated"),
        ("def get_config():\n    return {}", "kind is None"),
        ("def get_config():\n    return 3", "returns a ConfigDict"),
        ("x = 1", "get_config"),
        ("x = ", "SyntaxError"),
        ("def get_config():\n    return {'kind': 'generated', 'seeds': 1}", "seeds: no such key"),
    ],
)
def test_bad_config_file_is_named(tmp_path, text, message) -> None:
    path = tmp_path / "scenes.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(path), Preprocess(16))
    assert str(path) in str(error.value)
