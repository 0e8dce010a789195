import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import Crop, RandomCrop
from lvm.data.images.sources import jpeg, open_source


def crop(R=32, settings=None, samples=(0.5,) * 4, **fields):
    return Crop(R, settings=settings or RandomCrop(), samples=samples, **fields)


def ramp(width, height):
    """Red is the column and green the row, so that a crop's pixels tell its window."""
    column, row = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([column, row, np.full_like(row, 128)], -1).astype(np.uint8)


def jpeg_bytes(pixels, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("resizer", ["pillow", "swscale"])
def test_crop_windows_have_the_area_and_aspect_asked_for(resizer):
    settings, rng = RandomCrop((0.2, 0.35), (0.5, 2.0)), np.random.default_rng(0)
    areas, aspects, lefts = [], [], []
    for _ in range(2000):
        window = crop(settings=settings, samples=tuple(rng.random(4)), resizer=resizer)
        left, top, right, bottom = window._crop_box(500, 375)
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 375
        areas.append((right - left) * (bottom - top) / (500 * 375))
        aspects.append((right - left) / (bottom - top))
        lefts.append(left / (500 - (right - left)))
    assert min(areas) > 0.195
    assert max(areas) < 0.355
    assert abs(np.mean(areas) - 0.275) < 0.01
    assert abs(np.mean(np.log(aspects))) < 0.03
    assert 0.49 < max(aspects) / 4 < 0.51
    assert abs(np.mean(lefts) - 0.5) < 0.03


def test_crop_of_too_tall_windows_is_the_largest_that_fits():
    left, top, right, bottom = crop(settings=RandomCrop((0.9, 1.0), (1.0, 1.0)))._crop_box(400, 100)
    assert (left, top, right, bottom) == (150, 0, 250, 100)


def test_crop_takes_the_same_window_of_photos_and_labels():
    pixels, window = ramp(400, 300), crop(samples=(0.3, 0.1, 0.9, 0.2), settings=RandomCrop((0.3, 0.5)))
    photo, labels = window(pixels), window.resize_labels(pixels)
    assert np.abs(photo.astype(int) - labels).max() <= 2
    small = np.asarray(PIL.Image.fromarray(pixels).resize((200, 150), PIL.Image.Resampling.BOX))
    assert np.abs(window.resize_labels(small).astype(int) - labels).max() <= 3


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_crop_is_pillows_but_for_rounding(subsampling, mode):
    rng = np.random.default_rng(1)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    pixels = np.asarray(coarse.resize((333, 251), PIL.Image.Resampling.BICUBIC).convert(mode)) // 4 + 96
    data = jpeg_bytes(pixels, subsampling=subsampling) if mode == "RGB" else jpeg_bytes(pixels)
    for samples in ((0.1, 0.9, 0.99, 0.99), (0.7, 0.2, 0.3, 0.6)):
        fast = jpeg.read_crop(data, window := crop(64, samples=samples, resizer="swscale"), keeps_profile=False)
        slow = window(PIL.Image.open(io.BytesIO(data)))
        assert np.mean((fast.astype(float) - slow) ** 2) < 2.0  # 45 dB; chroma planes are scaled up otherwise


@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"icc_profile": b"x"}]
)
def test_jpeg_crop_needs_no_rows_below_its_window(monkeypatch, options):
    rng, samples = np.random.default_rng(1), (0.5, 0.0, 0.3, 0.1)
    window = crop(64, RandomCrop((0.1, 0.2)), samples, resizer="swscale")
    data = jpeg_bytes(rng.integers(0, 256, (251, 333, 3), np.uint8), **options)
    expected = jpeg.read_crop(data, window, keeps_profile=True)
    if "progressive" not in options:
        half = jpeg.read_crop(data[: len(data) * 3 // 4], window, keeps_profile=True)
        assert np.array_equal(half, expected)
    read_header = jpeg._read_header
    monkeypatch.setattr(jpeg, "_read_header", lambda data: read_header(data)._replace(is_baseline=False))
    assert np.array_equal(jpeg.read_crop(data, window, keeps_profile=True), expected)


def test_jpeg_crop_leaves_damaged_and_turned_files_to_pillow():
    data, window = jpeg_bytes(ramp(300, 200)), crop(resizer="swscale")
    assert jpeg.read_crop(data, window, keeps_profile=True) is not None
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = jpeg_bytes(ramp(300, 200), exif=exif)
    size = jpeg._read_header(data).offset
    huge = data[:size] + b"\xff" * 4 + data[size + 4 :]
    profiled = jpeg_bytes(ramp(300, 200), icc_profile=b"x" * 200)
    for other in (data[: len(data) // 2], data[:size], turned, profiled, huge, b"no image", b""):
        assert jpeg.read_crop(other, window, keeps_profile=False) is None


def test_crop_decodes_large_photos_at_a_fraction(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(ramp(1600, 1200)))
    source = open_source(str(tmp_path), Preprocess(32))
    full, reduced = (
        source.load_image(0, 0, "rgb", crop(32, samples=(0.2, 0.4, 0.1, 0.8), decode=decode))
        for decode in ("full", "reduced")
    )
    assert np.abs(full.astype(int) - reduced).max() <= 3
    assert crop(32, decode="reduced").min_decode_side((1600, 1200)) < 64


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": (0.9, 0.5)}, "scale"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"min_side": -1}, "min_side"),
    ],
)
def test_random_crop_rejects_impossible_windows(fields, key):
    with pytest.raises(UserError, match=key):
        RandomCrop(**fields)


@pytest.mark.parametrize("stream", ["rgb", "segmentation", "depth", "edges", "normals"])
def test_generated_images_are_cropped_and_equal_their_scenes(stream):
    config = {"num_scenes": 3, "num_frames": 3, "streams": ("rgb", "segmentation", "depth", "edges", "normals")}
    source = open_source("configs/demo_scenes.py", Preprocess(48), config)
    scene = source.load(1)
    whole = source.load_image(1, 2, stream, Preprocess(48))
    assert np.array_equal(whole, scene.images[2, scene.info.streams.index(stream)])
    zoomed = source.load_image(1, 2, stream, crop(48, settings=RandomCrop((0.25, 0.25), (1.0, 1.0))))
    expected = whole[12:36, 12:36].repeat(2, 0).repeat(2, 1)
    assert np.mean(np.abs(zoomed.astype(int) - expected) > 24) < 0.2


def test_crop_is_a_preprocess_of_every_field():
    fields = {field.name for field in dataclasses.fields(Crop)}
    assert fields == {field.name for field in dataclasses.fields(Preprocess)} | {"settings", "samples"}
