"""Video source: clips, frame rates, truncated and damaged files."""

from __future__ import annotations

import itertools
import pathlib
import pickle
import struct

import av
import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources.video import VideoSource
from tests.image_files import encode_image, photo

small = Preprocess(16)


def write_video(
    path: pathlib.Path, frames: int = 40, rate: int = 10, keyframes: int = 12, codec: str = "mpeg4"
) -> pathlib.Path:
    """Writes a video whose frame n has the mean gray level 30 + 4 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(0).integers(-25, 26, (48, 64, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(keyframes), "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(frames):
            pixels = np.repeat(30 + 4 * number + grain - round(grain.mean()), 3, axis=2).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(images: np.ndarray) -> list[int]:
    """Returns the frame numbers of images from `write_video`."""
    return np.rint((images.mean((1, 2, 3, 4)) - 30) / 4).astype(int).tolist()


def clip_frame_numbers(source) -> list[list[int]]:
    return [frame_numbers(source.load(index).images) for index in range(len(source))]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_video_is_cut_into_clips(tmp_path, suffix) -> None:
    path = write_video(tmp_path / f"v.{suffix}")
    source = open_source(str(path), small)
    infos = [source.info(i) for i in range(len(source))]
    assert [i.key for i in infos] == [f"v.{suffix}/clip-{clip:04d}" for clip in range(3)]
    assert {i.group for i in infos} == {f"v.{suffix}"}
    assert [i.num_frames for i in infos] == [16, 16, 8]
    assert clip_frame_numbers(source) == [list(range(16)), list(range(16, 32)), list(range(32, 40))]


@pytest.mark.parametrize(
    ("parameters", "frames"),
    [
        ({"rate": 5.0}, list(range(0, 40, 2))),
        ({"rate": 2.5}, list(range(0, 40, 4))),
        ({"stride": 3}, list(range(0, 40, 3))),
        ({"rate": 5.0, "stride": 3}, list(range(0, 40, 6))),
        ({"rate": 60.0}, list(range(40))),
        ({"rate": 4.0}, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]),
    ],
)
def test_rate_and_stride_select_frames(tmp_path, parameters, frames) -> None:
    source = VideoSource(small, path=str(write_video(tmp_path / "v.mp4")), clip_frames=7, **parameters)
    clips = clip_frame_numbers(source)
    assert list(itertools.chain(*clips)) == frames
    assert {len(clip) for clip in clips[:-1]} <= {7}


def test_frames_are_independent_of_the_seek(tmp_path) -> None:
    path = write_video(tmp_path / "v.mp4", keyframes=100)
    one_by_one = VideoSource(small, path=str(path), clip_frames=1)
    at_once = VideoSource(small, path=str(path), clip_frames=40)
    separate = np.concatenate([one_by_one.load(i).images for i in range(40)])
    np.testing.assert_array_equal(separate, at_once.load(0).images)


@pytest.mark.parametrize("suffix", ["avi", "mkv"])
def test_truncated_video_keeps_its_readable_frames(tmp_path, suffix) -> None:
    path = write_video(tmp_path / f"v.{suffix}")
    whole = open_source(str(path), small)
    expected = [whole.load(i).images for i in range(len(whole))]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    source = open_source(str(path), small)
    scenes = [source.load(i) for i in range(len(source))]
    kept = sum(len(scene.images) for scene in scenes)
    assert 0 < kept < 40
    np.testing.assert_array_equal(np.concatenate([scene.images for scene in scenes]), np.concatenate(expected)[:kept])
    for scene, info in zip(scenes, [source.info(i) for i in range(len(source))], strict=True):
        assert scene.info.num_frames == len(scene.images)
        assert len(scene.failures) == (len(scene.images) < info.num_frames)
    last = scenes[-1]
    assert last.images.shape == (0, 1, 16, 16, 3)
    assert last.failures[0].key == f"v.{suffix}/clip-0002"
    assert f"v.{suffix}: 8 of 8 frames are missing" in last.failures[0].reason


def test_unreadable_videos_are_skipped(tmp_path) -> None:
    write_video(tmp_path / "class" / "a.mp4", frames=3)
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(b"no video" * 100)
    data = (tmp_path / "class" / "a.mp4").read_bytes()
    (tmp_path / "d.mp4").write_bytes(data[: len(data) // 2])
    other = write_video(tmp_path / "f.mkv", frames=3)
    other.write_bytes(other.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_OTHER/THAN/IT"))
    with av.open(str(tmp_path / "e.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(str(tmp_path), small)
    assert [source.info(i).key for i in range(len(source))] == ["class/a.mp4/clip-0000"]
    reasons = {failure.key: failure.reason for failure in source.skipped}
    assert set(reasons) == {"b.mp4", "c.mp4", "d.mp4", "e.mkv", "f.mkv", "notes.txt"}
    assert reasons["f.mkv"] == "no decoder for its codec"
    assert reasons["e.mkv"] == "holds no video"
    assert "can't be opened" in reasons["c.mp4"]
    with pytest.raises(UserError, match=r"no usable video \(c\.mp4: can't be opened"):
        open_source(str(tmp_path / "c.mp4"), small)


def test_header_with_more_frames_than_bytes_is_rejected(tmp_path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=3)
    data = bytearray(path.read_bytes())
    sizes = data.index(b"stsz") + 12  # the number of frames
    data[sizes : sizes + 4] = struct.pack(">I", 2**30)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"no usable video \(v\.mp4"):
        open_source(str(path), small)


def test_animated_gif_is_a_video(tmp_path) -> None:
    frames = [photo(seed=i) for i in range(3)]
    images = [PIL.Image.fromarray(frame) for frame in frames]
    (tmp_path / "a.gif").write_bytes(
        encode_image(images[0], "GIF", save_all=True, append_images=images[1:], duration=100)
    )
    source = open_source(str(tmp_path / "a.gif"), small)
    assert source.load(0).images.shape == (3, 1, 16, 16, 3)


@pytest.mark.parametrize("name", ["a.gif", "a.mov"])
def test_alpha_of_videos_is_composed_over_black(tmp_path, name) -> None:
    frames = [np.full((16, 16, 4), (250 - i, 200, 100, 255), np.uint8) for i in range(2)]
    for frame in frames:
        frame[:, :8, 3] = 0
    if name == "a.gif":
        images = [PIL.Image.fromarray(frame) for frame in frames]
        gif = encode_image(images[0], "GIF", save_all=True, append_images=images[1:], disposal=2)
        (tmp_path / name).write_bytes(gif)
    else:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("png", rate=10, width=16, height=16, pix_fmt="rgba")
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
            container.mux(stream.encode())
    images = open_source(str(tmp_path / name), Preprocess(16, filter="nearest")).load(0).images[:, 0]
    assert len(images) == 2
    for i, image in enumerate(images):
        assert not image[:, :8].any()
        assert (image[:, 8:] == (250 - i, 200, 100)).all()


def test_video_description_is_location_independent(tmp_path) -> None:
    for folder in ("a", "b"):
        write_video(tmp_path / folder / "v.mp4", frames=4)
    first, second = (open_source(str(tmp_path / folder), small) for folder in ("a", "b"))
    assert first.describe() == second.describe()
    assert first.describe()["clip_frames"] == 16


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"rate": -1.0}, r"video\.rate=-1"), ({"stride": 0}, r"video\.stride=0"), ({"clips": 1}, "no such key")],
)
def test_video_rejects_bad_parameters(tmp_path, parameters, message) -> None:
    with pytest.raises(UserError, match=message):
        VideoSource(small, path=str(tmp_path), **parameters)


def test_recorded_rotation_is_applied(tmp_path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[:, :32] = 255
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    plain = open_source(str(path), small).load(0).images[0, 0]
    assert plain[:, :6].min() > 200  # bright at the left
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of a track's header: rows of 16.16 fixed point, here (0, 1), (−1, 0)
    data[matrix : matrix + 20] = struct.pack(">iiiii", 0, 1 << 16, 0, -1 << 16, 0)
    path.write_bytes(data)
    rotated = open_source(str(path), small).load(0).images[0, 0]
    assert rotated[:6].min() > 200  # a quarter clockwise: bright at the top
    assert rotated[-6:].max() < 50


def test_video_source_pickles(tmp_path) -> None:
    source = open_source(str(write_video(tmp_path / "v.mp4", frames=3)), small, {"derived": ("noisy",)})
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(0).images, source.load(0).images)
