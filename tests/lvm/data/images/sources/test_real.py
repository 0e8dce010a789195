"""Real images through several kinds of source: equal images, whatever contains them."""

from __future__ import annotations

import pathlib
import tarfile

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.streams.derived import DERIVED
from tests.commands import SHARED_DATA

pytestmark = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}: real images are not distributed")

medium = Preprocess(64)
COUNT = 12


@pytest.fixture(scope="module")
def photos() -> tuple[list[pathlib.Path], np.ndarray]:
    """Returns photo paths, and their images uint8 [n, R, R, 3]."""
    source = open_source(str(SHARED_DATA / "photos"), medium)
    paths = [SHARED_DATA / "photos" / source.info(i).key for i in range(COUNT)]
    return paths, np.stack([source.load(i).images[0, 0] for i in range(COUNT)])


def images_of(spec: pathlib.Path) -> np.ndarray:
    source = open_source(str(spec), medium)
    scenes = [source.load(i) for i in range(len(source))]
    assert not [failure for scene in scenes for failure in scene.failures]
    assert source.skipped == ()
    return np.concatenate([scene.images[:, 0] for scene in scenes])


def test_tar_records_and_parquet_give_equal_images(photos, tmp_path) -> None:
    paths, expected = photos
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for path in paths:
        writer.write(path.read_bytes())
    writer.close()
    pq.write_table(pa.table({"image": [path.read_bytes() for path in paths]}), tmp_path / "a.parquet")
    for name in ("a.tar", "a.array_record", "a.parquet"):
        np.testing.assert_array_equal(images_of(tmp_path / name), expected)


def test_video_frames_match_their_images(tmp_path) -> None:
    folder = open_source(str(SHARED_DATA / "davis"), medium, {"clip_frames": 20})
    scene = folder.load(0)
    frames = sorted((SHARED_DATA / "davis" / "rgb" / scene.info.group).iterdir())[: len(scene.images)]
    photos = [PIL.Image.open(frame).convert("RGB") for frame in frames]
    width, height = photos[0].width // 2 * 2, photos[0].height // 2 * 2
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for photo in photos:
            container.mux(stream.encode(av.VideoFrame.from_image(photo.resize((width, height)))))
        container.mux(stream.encode())
    decoded = images_of(tmp_path / "a.mp4").astype(int)
    assert decoded.shape == scene.images[:, 0].shape
    near = np.abs(decoded - scene.images[:, 0]).mean((1, 2, 3))
    apart = np.abs(decoded[1:] - scene.images[:-1, 0]).mean((1, 2, 3))
    assert (near < 4).all()
    assert (near[1:] < apart).all()  # each frame is nearest to its own, not to the one before


@pytest.mark.parametrize("name", ["photos", "davis"])
def test_derived_streams_of_real_images(name) -> None:
    source = open_source(str(SHARED_DATA / name), medium, {"derived": tuple(DERIVED)})
    scene = source.load(0)
    assert scene.images.shape[1] == len(source.info(0).streams)
    for column, stream in enumerate(scene.info.streams):
        if stream in DERIVED:
            assert (scene.images[:, column] != scene.images[:, 0]).any(), stream


def test_reduced_decoding_of_real_photos_is_close(photos) -> None:
    _, expected = photos
    reduced = open_source(str(SHARED_DATA / "photos"), Preprocess(64, decode="reduced"))
    images = np.stack([reduced.load(i).images[0, 0] for i in range(COUNT)]).astype(int)
    assert 0 < np.abs(images - expected).mean() < 2
