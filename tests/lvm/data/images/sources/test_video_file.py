"""Video files: orientation, alpha, several streams, order of frames."""

import pathlib
import struct

import av
import numpy as np
import pytest
from av.stream import Disposition

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from tests.video_files import frame_numbers, write_video

small = Preprocess(16)


def write_image(path: pathlib.Path, pixels: np.ndarray, codec: str, pix_fmt: str) -> pathlib.Path:
    """Writes three frames of an image, uint8 [H, W, 3] or [H, W, 4]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], pix_fmt
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def first_image(path: pathlib.Path) -> np.ndarray:
    scene = open_source(str(path), small).load(0)
    assert not scene.failures
    return scene.images[0, 0].astype(int)


@pytest.mark.parametrize(
    ("matrix", "orient"),  # (x, y) ↦ (a x + c y, b x + d y)
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda image: np.rot90(image.swapaxes(0, 1), 2)),
    ],
)
def test_recorded_orientation_is_applied(tmp_path, matrix, orient) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32], pixels[:32, 32:], pixels[32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = write_image(tmp_path / "v.mp4", pixels, "mpeg4", "yuv420p")
    plain = first_image(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # of a track's header: rows (a, b, 0), (c, d, 0) of 16.16 fixed point
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 20] = struct.pack(">iiiii", a, b, 0, c, d)
    path.write_bytes(data)
    np.testing.assert_allclose(first_image(path), orient(plain), atol=4)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("v.mov", "qtrle", "argb"), ("v.webm", "libvpx-vp9", "yuva420p")]
)
def test_alpha_of_any_codec_is_composed_over_black(tmp_path, name, codec, pix_fmt) -> None:
    pixels = np.full((48, 64, 4), 200, np.uint8)
    pixels[:, :32, 3], pixels[:, 32:, 3] = 0, 128
    image = first_image(write_image(tmp_path / name, pixels, codec, pix_fmt))
    assert image[:, :6].max() <= 2
    np.testing.assert_allclose(image[:, -6:], 100, atol=3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("is_attached", [False, True])
def test_video_is_read_and_not_its_cover_picture(tmp_path, suffix, is_attached) -> None:
    video, path = write_video(tmp_path / "video.mp4"), tmp_path / f"v.{suffix}"
    with av.open(str(video)) as source, av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 96, "yuvj420p"
        if is_attached:
            cover.disposition = Disposition.attached_pic
        stream = container.add_stream_from_template(source.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.zeros((96, 96, 3), np.uint8), format="rgb24")
        picture.pts = 0
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    source = open_source(str(path), small)
    assert len(source) == 3
    assert frame_numbers(source.load(1).images) == list(range(16, 32))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.mp4", "libx264"), ("v.avi", "libx264"), ("v.avi", "mpeg4"), ("v.ts", "libx264"), ("v.mpg", "mpeg2video"),
        ("v.mkv", "libx264"), ("v.flv", "libx264"),
    ],
)  # fmt: skip
def test_b_frames_are_shown_in_order(tmp_path, name, codec) -> None:
    path = write_video(tmp_path / name, rate=25, codec=codec, b_frames=3)
    source = open_source(str(path), small, {"clip_frames": 8})
    assert [frame_numbers(source.load(i).images) for i in range(5)] == [list(range(8 * i, 8 * i + 8)) for i in range(5)]
    assert not source.skipped


def test_frames_larger_than_the_header_says_are_refused(tmp_path) -> None:
    path = write_video(tmp_path / "v.webm", frames=20, codec="libvpx", keyframes=5)
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.is_keyframe][2]
    data = bytearray(path.read_bytes())
    at = data.index(packet[:64]) + 6  # width and height of a key frame of VP8
    data[at : at + 4] = struct.pack("<HH", 12000, 12000)
    path.write_bytes(data)
    scene = open_source(str(path), small, {"clip_frames": 20}).load(0)
    assert len(scene.images) == 10
    assert len(scene.failures) == 1


def test_times_before_zero_are_read(tmp_path) -> None:
    times, options = [100 * i - 1000 for i in range(21)], {"avoid_negative_ts": "disabled"}
    path = write_video(tmp_path / "v.ts", codec="libx264", times_ms=times, options=options)
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).pts < 0
    source = open_source(str(path), small, {"rate": 5.0, "clip_frames": 5})
    assert [frame_numbers(source.load(i).images) for i in range(2)] == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18]]
