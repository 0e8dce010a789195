"""Derived streams: the content of each, and its dependence on the scene's key alone."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.images.augment import mirror_images
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.images.sources.generated import GeneratedSource
from lvm.data.mixture.recipes import Pairs
from lvm.data.streams.codecs import codec_from_json
from lvm.data.streams.derived import DERIVED, derive
from tests.image_files import encode_image, photo

IMAGES = np.stack([photo(256, 256, seed) for seed in range(3)])


@given(
    stream=st.sampled_from(sorted(DERIVED)),
    resolution=st.sampled_from([1, 16, 33, 64]),
    frames=st.integers(0, 3),
    key=st.text(max_size=5),
    seed=st.integers(0, 3),
)
def test_derive_is_a_function_of_key_and_seed(stream, resolution, frames, key, seed) -> None:
    images = IMAGES[:frames, :resolution, :resolution]
    first = derive(stream, images, key, seed)
    assert (first.shape, first.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(first, derive(stream, images.copy(), key, seed))


@pytest.mark.parametrize("stream", sorted(set(DERIVED) - {"edges", "gray"}))
def test_derive_differs_by_key_and_seed(stream) -> None:
    results = {derive(stream, IMAGES[:1], key, seed).tobytes() for key in "abcdefgh" for seed in (0, 1)}
    assert len(results) >= 3  # rotations and reductions have three


def test_derive_differs_by_stream() -> None:
    results = {derive(stream, IMAGES[:1], "a").tobytes() for stream in DERIVED}
    assert len(results) == len(DERIVED)


def test_gray_is_luma() -> None:
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    levels = derive("gray", pixels[None], "")[0, 0]
    assert levels.tolist() == [[76] * 3, [150] * 3, [29] * 3, [255] * 3]  # .2989, .5870, .1140 of 255


def test_edges_are_at_object_boundaries() -> None:
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, 20:44, 20:44] = 255
    edges = derive("edges", image, "")[0, ..., 0]
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges)
    distance = np.minimum.reduce([abs(rows - 19.5), abs(rows - 43.5), abs(columns - 19.5), abs(columns - 43.5)])
    assert distance.max() <= 1.5
    assert len(rows) >= 4 * 20
    assert not derive("edges", np.full((1, 16, 16, 3), 90, np.uint8), "").any()


def _mask(key: str, resolution: int = 256) -> np.ndarray:
    """The black pixels of a masked white image, bool [R, R]."""
    return derive("masked", np.full((1, resolution, resolution, 3), 255, np.uint8), key)[0, ..., 0] == 0


def test_masked_is_one_square_or_patches() -> None:
    masks = [_mask(f"key {number}") for number in range(400)]
    sides, shares = [], []
    for mask in masks:
        blocks = mask.reshape(8, 32, 8, 32).mean((1, 3))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if np.isin(blocks, (0, 1)).all():
            shares.append(1 - blocks.mean())  # a square of whole patches is as rare as 1 in 1000
        else:
            side = len(rows)
            assert len(columns) == side
            assert mask.sum() == side**2
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            sides.append(side)
    assert 0.23 < len(sides) / 400 < 0.37  # p 0.3
    assert (min(sides), max(sides)) >= (25, 110)
    assert max(sides) < 128
    assert np.abs(np.quantile(shares, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.1  # U(0, 1)


def test_masked_scales_and_is_the_same_in_all_frames() -> None:
    blocks = [_mask(f"key {number}", 64).reshape(8, 8, 8, 8).mean((1, 3)) for number in range(40)]
    assert any(np.isin(b, (0, 1)).all() and 0 < b.mean() < 1 for b in blocks)
    frames = derive("masked", np.full((2, 64, 64, 3), 255, np.uint8), "a")
    np.testing.assert_array_equal(frames[0], frames[1])


def test_degradations_have_their_statistics() -> None:
    flat = np.full((2, 128, 128, 3), 128, np.uint8)
    noisy = derive("noisy", flat, "a").astype(float)
    assert 9 < noisy.std() < 52
    assert abs(noisy.mean() - 128) < 2
    assert (noisy[0] != noisy[1]).mean() > 0.5  # every frame has its own noise
    for key in "abcd":
        assert derive("low_light", flat, key).mean() < 0.6 * 128
        rain = derive("rain", flat, key).astype(int)
        assert (rain >= 128).all()
        assert 0.005 < (rain > 140).mean() < 0.5
        assert (rain[0] != rain[1]).any()
    low = derive("low_resolution", IMAGES, "a").astype(int)
    fine = np.abs(np.diff(derive("noisy", IMAGES, "a").astype(int), axis=1)).mean()
    assert np.abs(np.diff(low, axis=1)).mean() < fine
    assert np.abs(low.mean((1, 2)) - IMAGES.mean((1, 2))).max() < 3


def test_low_resolution_averages_whole_blocks() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    sizes = set()
    for key in "abcdefgh":
        low, matches = derive("low_resolution", images, key).astype(int), []
        for size in (4, 6, 8):
            means = np.rint(images.reshape(2, 48 // size, size, 48 // size, size, 3).mean(axis=(2, 4))).astype(np.uint8)
            enlarged = [PIL.Image.fromarray(x).resize((48, 48), PIL.Image.Resampling.BICUBIC) for x in means]
            if np.abs(low - np.stack(enlarged)).max() <= 4:  # a level in rounding
                matches.append(size)
        assert len(matches) == 1
        sizes.update(matches)
    assert sizes == {4, 6, 8}


def test_rotated_is_by_90_180_or_270_degrees() -> None:
    for key in "abcdef":
        rotated = derive("rotated", IMAGES, key)
        turns = [k for k in (0, 1, 2, 3) if (np.rot90(IMAGES, k, (1, 2)) == rotated).all()]
        assert turns in ([1], [2], [3])


# --- As streams of an image source.


def test_derived_streams_of_any_source(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encode_image(photo()))
    (tmp_path / "broken.png").write_bytes(encode_image(photo())[:50])
    plain = open_source(str(tmp_path), Preprocess(32))
    source = open_source(str(tmp_path), Preprocess(32), {"derived": ("gray", "masked"), "derived_seed": 3})
    assert source.stream_sets == (("rgb", "gray", "masked"),)
    assert set(Pairs("gray", "rgb").streams) <= set(source.info(0).streams)
    scene = source.load(1)
    assert scene.info.streams == ("rgb", "gray", "masked")
    np.testing.assert_array_equal(scene.images[:, :1], plain.load(1).images)
    np.testing.assert_array_equal(scene.images[:, 2], derive("masked", scene.images[:, 0], "b.png", 3))
    assert source.load(2).images.shape == (0, 3, 32, 32, 3)
    assert len(source.load(2).failures) == 1
    assert {name: codec_from_json(codec.to_json()) for name, codec in source.streams.items()} == source.streams
    assert source.describe() == plain.describe() | {"derived": ["gray", "masked"], "derived_seed": 3}
    assert mirror_images(scene.images, [source.streams[s] for s in scene.info.streams]).shape == scene.images.shape


def test_existing_or_unknown_derived_stream_raises() -> None:
    scenes = GeneratedSource(Preprocess(16), num_scenes=2, num_frames=1)
    for derived, message in (
        (("blur",), "'blur' is unknown; expected some of edges, gray"),
        (("edges",), "'edges' is a stream of the source already"),
        (("gray", "gray"), "'gray' is named twice"),
    ):
        with pytest.raises(UserError, match=message):
            DerivedStreams(scenes, derived)
    with pytest.raises(UserError, match="computed from rgb"):
        DerivedStreams(GeneratedSource(Preprocess(16), streams=("depth",)), ("gray",))


def test_derived_stream_sets_stay_sorted() -> None:
    class TwoSets(GeneratedSource):
        """Scenes of which some have depth."""

        def __init__(self) -> None:
            super().__init__(Preprocess(16), num_scenes=2)
            self.stream_sets = (("rgb",), ("rgb", "depth"))

    source = DerivedStreams(TwoSets(), ("noisy",))
    assert source.stream_sets == (("rgb", "depth", "noisy"), ("rgb", "noisy"))
