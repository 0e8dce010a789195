"""What evaluation is asked on: held-out scenes alone, as their source and their encoder give them."""

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.mixture import split
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.streams.codecs import Image, Palette
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.reconstruction import reconstruction_metrics

FRACTION = 0.5


class Numbers:
    """A source whose images show scene, frame and stream; every third scene has no segmentation."""

    name, skipped, classes = "numbers", (), ()
    streams = {"rgb": Image(), "segmentation": Palette(("nothing", "thing"), background=0)}  # noqa: RUF012
    stream_sets = (("rgb",), ("rgb", "segmentation"))

    def __init__(self, count=24, unreadable=()):
        self.count, self.unreadable = count, unreadable

    def __len__(self):
        return self.count

    def info(self, index):
        streams = ("rgb",) if index % 3 == 0 else ("rgb", "segmentation")
        return SceneInfo(f"scene {index}", f"group {index // 2}", "", 1 + index % 4, streams)

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
        return Heldout(source or Numbers(), fraction, max_scenes, exact_codec[0])

    return make


def numbers(heldout):
    return [int(scene.info.key.split()[1]) for scene in heldout.scenes]


def test_the_scenes_are_those_that_the_split_holds_out(make_heldout):
    source = Numbers()
    hashes = np.array([split.group_hash(source.info(i).group) for i in range(24)], np.uint64)
    found = numbers(make_heldout())
    assert found == np.flatnonzero(split.heldout_mask(hashes, FRACTION)).tolist()
    assert 0 < len(found) < 24


def test_no_more_are_read_than_asked_for_and_they_are_spread_over_the_source(make_heldout):
    every, some = numbers(make_heldout()), numbers(make_heldout(max_scenes=3))
    assert len(some) <= 3
    assert some == every[:: -(-len(every) // 3)]


def test_images_and_their_codes_belong_together(make_heldout, exact_codec):
    for scene in make_heldout().scenes:
        for frame in range(len(scene.images)):
            for column, stream in enumerate(scene.info.streams):
                image = scene.image(frame, stream)
                number = int(scene.info.key.split()[1])
                assert image[0, 0].tolist() == [number, frame, column]
                np.testing.assert_array_equal(exact_codec[1](scene.grid(frame, stream)[None])[0], image)


def test_all_images_of_a_stream_are_in_the_order_of_their_codes(make_heldout, exact_codec):
    heldout = make_heldout()
    for stream in ("rgb", "segmentation"):
        images = heldout.images(stream)
        np.testing.assert_array_equal(exact_codec[1](heldout.codes(stream)), images)
        assert len(images) == sum(len(scene.images) for scene in heldout.with_streams([stream]))
    assert len(heldout.images("rgb")) > len(heldout.images("segmentation"))


def test_scenes_are_chosen_by_streams_and_frames(make_heldout):
    for scene in make_heldout().with_streams(["segmentation"], min_frames=3):
        number = int(scene.info.key.split()[1])
        assert number % 3
        assert number % 4 >= 2


def test_a_scene_that_can_not_be_read_is_said_and_left_out(make_heldout, caplog):
    lost = numbers(make_heldout())[0]
    heldout = make_heldout(Numbers(unreadable=[lost]))
    assert lost not in numbers(heldout)
    assert heldout.failures == [Failure(f"scene {lost}", "cut off")]
    assert f"skipped scene {lost}: cut off" in caplog.text


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"source": Numbers(unreadable=range(24))}])
def test_nothing_held_out_is_refused(make_heldout, options):
    with pytest.raises(UserError, match=r"no held-out scene can be read; heldout_fraction must be"):
        make_heldout(**options)


def test_sentences_follow_the_recipe(make_heldout, exact_codec):
    heldout = make_heldout()
    pairs = exact_codec[1](heldout.sentences(Pairs(shots=2), 10, seed=0)).reshape(10, 4, 4, 4, 3)[:, :, 0, 0]
    assert (pairs[:, :, 2] == [0, 1, 0, 1]).all()
    np.testing.assert_array_equal(pairs[:, 0, :2], pairs[:, 1, :2])  # the same scene and frame
    assert (pairs[:, 0, 0] != pairs[:, 2, 0]).all()  # another scene
    videos = heldout.sentences(Video(frames=3, strides=(1,)), 10, seed=0)
    frames = exact_codec[1](videos).reshape(10, 3, 4, 4, 3)[:, :, 0, 0]
    assert (np.diff(frames[:, :, 1].astype(int)) == 1).all()
    assert (frames[:, :, 0] == frames[:, :1, 0]).all()


def test_sentences_are_a_function_of_the_seed(make_heldout):
    heldout = make_heldout()
    first, again, other = (heldout.sentences(Single(), 10, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("recipe", [Single("depth"), Pairs(shots=99), Video(frames=9, strides=(1,))])
def test_where_the_scenes_do_not_allow_a_recipe_there_are_no_sentences(make_heldout, recipe):
    assert make_heldout().sentences(recipe, 10, seed=0) is None


def test_an_exact_tokenizer_reconstructs_everything(make_heldout, exact_codec):
    heldout = make_heldout()
    figures = reconstruction_metrics(heldout, exact_codec[1], 256)
    assert figures["psnr"] == {"rgb": pytest.approx(100), "segmentation": pytest.approx(100)}
    assert figures["round_trip_pixel_accuracy"] == 1
    assert figures["round_trip_foreground_iou"] == 1
    codes = np.concatenate([heldout.codes("rgb").ravel(), heldout.codes("segmentation").ravel()])
    assert figures["num_codes_counted"] == len(codes)
    assert figures["codebook_usage"] == len(np.unique(codes)) / 256
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    assert figures["codebook_perplexity"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))


def test_a_tokenizer_that_forgets_is_seen_to(make_heldout, exact_codec):
    white = lambda codes: np.full_like(exact_codec[1](codes), 255)  # noqa: E731
    figures = reconstruction_metrics(make_heldout(), white, 256)
    assert max(figures["psnr"].values()) < 1
    assert figures["round_trip_pixel_accuracy"] < 0.1
