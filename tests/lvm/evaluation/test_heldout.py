"""Held-out scenes of an image source."""

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.images.sources.folder import FolderSource
from lvm.data.images.sources.generated import GeneratedSource
from lvm.data.images.sources.scene import Failure, SceneImages, SceneInfo
from lvm.data.mixture import split
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.streams.codecs import Image, Palette
from lvm.evaluation.heldout import Heldout, check_source

FRACTION = 0.5


class FakeSource(ImageSource):
    """Images hold their scene, frame and stream indices; every third scene has no segmentation."""

    name, skipped, classes = "fake", (), ()
    streams = {"rgb": Image(), "segmentation": Palette(("nothing", "thing"), background=0)}  # noqa: RUF012
    stream_sets = (("rgb",), ("rgb", "segmentation"))

    def __init__(self, count=24, unreadable=()):
        self.count, self.unreadable = count, unreadable

    def __len__(self):
        return self.count

    def info(self, index):
        streams = ("rgb",) if index % 3 == 0 else ("rgb", "segmentation")
        return SceneInfo(f"scene {index}", f"group {index // 2}", "", 1 + index % 4, streams)

    def describe(self):
        return {}

    def load(self, index):
        info = self.info(index)
        frames = 0 if index in self.unreadable else info.num_frames
        images = np.zeros((frames, len(info.streams), 4, 4, 3), np.uint8)
        images[..., 0] = index
        images[..., 1] = np.arange(frames)[:, None, None, None]
        images[..., 2] = np.arange(len(info.streams))[:, None, None]
        failures = (Failure(info.key, "cut off"),) if index in self.unreadable else ()
        return SceneImages(info, images, failures)


@pytest.fixture
def make_heldout(exact_codec):
    def make(source=None, fraction=FRACTION, max_scenes=99):
        return Heldout(source or FakeSource(), fraction, max_scenes, exact_codec[0])

    return make


def scene_indices(heldout):
    return [int(scene.info.key.split()[1]) for scene in heldout.scenes]


def test_heldout_matches_the_split(make_heldout):
    source = FakeSource()
    hashes = np.array([split.group_hash(source.info(i).group) for i in range(24)], np.uint64)
    indices = scene_indices(make_heldout())
    assert indices == np.flatnonzero(split.heldout_mask(hashes, FRACTION)).tolist()
    assert 0 < len(indices) < 24


def test_heldout_spreads_max_scenes_over_the_source(make_heldout):
    all_scenes, some = scene_indices(make_heldout()), scene_indices(make_heldout(max_scenes=3))
    assert len(some) <= 3
    assert some == all_scenes[:: -(-len(all_scenes) // 3)]


def test_heldout_scene_image_matches_grid(make_heldout, exact_codec):
    for scene in make_heldout().scenes:
        for frame in range(len(scene.images)):
            for column, stream in enumerate(scene.info.streams):
                image = scene.image(frame, stream)
                index = int(scene.info.key.split()[1])
                assert image[0, 0].tolist() == [index, frame, column]
                np.testing.assert_array_equal(exact_codec[1](scene.grid(frame, stream)[None])[0], image)


def test_heldout_images_match_codes(make_heldout, exact_codec):
    heldout = make_heldout()
    for stream in ("rgb", "segmentation"):
        images = heldout.images(stream)
        np.testing.assert_array_equal(exact_codec[1](heldout.codes(stream)), images)
        assert len(images) == sum(len(scene.images) for scene in heldout.with_streams([stream]))
    assert len(heldout.images("rgb")) > len(heldout.images("segmentation"))


def test_with_streams_filters_by_streams_and_frames(make_heldout):
    heldout = make_heldout()
    scenes = heldout.with_streams(["segmentation"], min_frames=3)
    expected = [index for index in scene_indices(heldout) if index % 3 and index % 4 >= 2]
    assert [int(scene.info.key.split()[1]) for scene in scenes] == expected
    assert 0 < len(expected) < len(heldout.scenes)


def test_heldout_logs_and_skips_unreadable_scenes(make_heldout, caplog):
    lost = scene_indices(make_heldout())[0]
    heldout = make_heldout(FakeSource(unreadable=[lost]))
    assert lost not in scene_indices(heldout)
    assert heldout.failures == [Failure(f"scene {lost}", "cut off")]
    assert f"skipped scene {lost}: cut off" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "no scene of fake is held out by heldout_fraction=0.0, .* 0 of 24"),
        ({"source": FakeSource(unreadable=range(24))}, "heldout_fraction=0.5, .* can be read: 1. of 24"),
        ({"source": FakeSource(unreadable=range(24)), "fraction": None}, "no scene of fake can be read: 24 of 24"),
    ],
)
def test_heldout_without_scenes_is_user_error(make_heldout, options, message):
    with pytest.raises(UserError, match=message):
        make_heldout(**options)


def test_sentences_follow_the_recipe(make_heldout, exact_codec):
    heldout = make_heldout()
    codes, pair_groups = heldout.sentences(Pairs(shots=2), 10, seed=0)
    pairs = exact_codec[1](codes).reshape(10, 4, 4, 4, 3)[:, :, 0, 0]
    assert (pairs[:, :, 2] == [0, 1, 0, 1]).all()
    np.testing.assert_array_equal(pairs[:, 0, :2], pairs[:, 1, :2])  # the same scene and frame
    assert (pairs[:, 0, 0] != pairs[:, 2, 0]).all()  # another scene
    videos, groups = heldout.sentences(Video(frames=3, strides=(1,)), 10, seed=0)
    frames = exact_codec[1](videos).reshape(10, 3, 4, 4, 3)[:, :, 0, 0]
    assert (np.diff(frames[:, :, 1].astype(int)) == 1).all()
    assert (frames[:, :, 0] == frames[:, :1, 0]).all()
    expected = np.vectorize(lambda scene: split.group_hash(f"group {scene // 2}"), otypes=[np.uint64])
    np.testing.assert_array_equal(groups, expected(frames[:, :, 0]))
    np.testing.assert_array_equal(pair_groups, expected(pairs[:, :, 0]))


def test_sentences_are_deterministic_in_the_seed(make_heldout):
    heldout = make_heldout()
    first, again, other = (heldout.sentences(Single(), 10, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("recipe", [Single("depth"), Pairs(shots=99), Video(frames=9, strides=(1,))])
def test_sentences_is_none_without_suitable_scenes(make_heldout, recipe):
    assert make_heldout().sentences(recipe, 10, seed=0) is None


@pytest.fixture
def photos(tmp_path):
    """A folder source of three photos, and another one of the same photos with a derived stream."""
    for index in range(3):
        PIL.Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    source = FolderSource(Preprocess(8), path=str(tmp_path))
    return source, DerivedStreams(source, ("gray",))


def test_training_source_with_derived_streams_is_the_training_source(photos):
    plain, derived = photos
    for trained, asked in ((plain, derived), (derived, plain)):
        check_source(asked, [trained.describe()], False, "photos")
        with pytest.raises(UserError, match="is what the model was trained on"):
            check_source(asked, [trained.describe()], True, "photos")


def test_source_must_be_declared_unseen(photos):
    generated = GeneratedSource(Preprocess(8))
    with pytest.raises(UserError, match=r"photos is not what the model was trained on.* set config.unseen=true"):
        check_source(photos[0], [generated.describe()], False, "photos")
    check_source(photos[0], [generated.describe()], True, "photos")
    # Scenes of one seed are the same whatever their number and streams, but not those of other shapes.
    check_source(GeneratedSource(Preprocess(8), num_scenes=7), [generated.describe()], False, "scenes")
    check_source(GeneratedSource(Preprocess(8), shapes=(1, 2)), [generated.describe()], True, "scenes")
