"""Video source: clips, frame rates, truncated and damaged files."""

from __future__ import annotations

import itertools
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
from tests.video_files import frame_numbers, write_video

small = Preprocess(16)


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
        ({"rate": 9.95}, list(range(40))),
        ({"rate": 4.0}, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]),
    ],
)
def test_rate_and_stride_select_frames(tmp_path, parameters, frames) -> None:
    source = VideoSource(small, path=str(write_video(tmp_path / "v.mp4")), clip_frames=7, **parameters)
    clips = clip_frame_numbers(source)
    assert list(itertools.chain(*clips)) == frames
    assert [len(clip) for clip in clips[:-1]] == [7] * ((len(frames) - 1) // 7)


THIRTY_FPS = [round(1000 * i / 30) for i in range(91)]  # as Matroska rounds it
BURSTS = [0, 100, 200, 300, 400, 20400, 20500, 20600, 20700, 20800, 20900]
STILL = [0, 10000, 20000, 60000]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("times_ms", "parameters", "frames"),
    [
        (THIRTY_FPS, {}, list(range(90))),
        (THIRTY_FPS, {"rate": 30.0}, list(range(90))),
        (THIRTY_FPS, {"rate": 10.0}, list(range(0, 90, 3))),
        (BURSTS, {}, list(range(10))),
        (BURSTS, {"stride": 2}, [0, 2, 4, 6, 8]),
        (BURSTS, {"rate": 1.0}, [0, *[4] * 20]),
        (BURSTS, {"rate": 10.0}, [0, 1, 2, 3, *[4] * 200, 5, 6, 7, 8, 9]),
        (STILL, {}, [0, 1, 2]),
        (STILL, {"rate": 0.25}, [0, 0, 0, 1, 1, *[2] * 10]),
        ([0, 60000], {"rate": 0.25}, [0] * 15),
        ([5000 + time for time in BURSTS], {"rate": 1.0}, [0, *[4] * 20]),
    ],
)
def test_frames_are_selected_by_their_own_times(tmp_path, suffix, times_ms, parameters, frames) -> None:
    path = write_video(tmp_path / f"v.{suffix}", rate=1000, times_ms=times_ms)  # the rate that it states is no guide
    source = VideoSource(small, path=str(path), **parameters)
    assert not source.skipped
    assert list(itertools.chain(*clip_frame_numbers(source))) == [number % 45 for number in frames]


@pytest.mark.parametrize(("media_time", "frames"), [(None, range(20)), (10240, range(10, 30))])
def test_edit_list_limits_the_frames(tmp_path, media_time, frames) -> None:
    path = write_video(tmp_path / "v.mp4")
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    data[entry : entry + 4] = struct.pack(">I", 2000)  # ms of the 4 s that are shown
    if media_time is not None:
        data[entry + 4 : entry + 8] = struct.pack(">i", media_time)  # its start, in units of 1/10240 s
    path.write_bytes(data)
    source = open_source(str(path), small)
    assert list(itertools.chain(*clip_frame_numbers(source))) == list(frames)
    assert not source.skipped
    assert not source.load(1).failures


def test_live_webm_without_duration_is_read(tmp_path) -> None:
    path = tmp_path / "v.webm"
    write_video(path, rate=1000, codec="libvpx", times_ms=THIRTY_FPS, options={"live": "1"})
    source = VideoSource(small, path=str(path), rate=10)
    assert list(itertools.chain(*clip_frame_numbers(source))) == [number % 45 for number in range(0, 90, 3)]
    assert sum(info.num_frames for info in map(open_source(str(path), small).info, range(6))) == 90


def test_times_that_go_back_end_a_video(tmp_path) -> None:
    part = write_video(tmp_path / "part.ts", rate=25, codec="mpeg2video")
    (tmp_path / "v.ts").write_bytes(part.read_bytes() * 2)
    source = open_source(str(tmp_path / "v.ts"), small)
    assert "its times go back after frame 39" in source.skipped[0].reason
    assert max(itertools.chain(*clip_frame_numbers(source))) == 39


def test_long_damaged_video_is_rejected(tmp_path) -> None:
    path = write_video(tmp_path / "v.mkv", times_ms=[0, 100, 2_000_000_000])
    assert VideoSource(small, path=str(path)).info(0).num_frames == 2
    with pytest.raises(UserError, match=r"no usable video \(v\.mkv: damaged: its frames last 2000000 s"):
        len(VideoSource(small, path=str(path), rate=5))


def test_frames_are_independent_of_the_seek(tmp_path) -> None:
    path = write_video(tmp_path / "v.mp4", keyframes=100)
    one_by_one = VideoSource(small, path=str(path), clip_frames=1)
    at_once = VideoSource(small, path=str(path), clip_frames=40)
    separate = np.concatenate([one_by_one.load(i).images for i in range(40)])
    np.testing.assert_array_equal(separate, at_once.load(0).images)


@pytest.mark.parametrize("rate", [0, 5])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "flv"])
def test_truncated_video_keeps_its_readable_frames(tmp_path, suffix, rate) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write_video(tmp_path / f"v.{suffix}", codec="flv1" if suffix == "flv" else "mpeg4", options=options)
    whole = VideoSource(small, path=str(path), rate=rate)
    assert not whole.skipped
    expected = np.concatenate([whole.load(i).images for i in range(len(whole))])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    source = VideoSource(small, path=str(path), rate=rate)
    kept = np.concatenate([source.load(i).images for i in range(len(source))])
    assert 5 < len(kept) < 0.6 * len(expected)
    np.testing.assert_array_equal(kept, expected[: len(kept)])
    assert [failure.key for failure in source.skipped] == [f"v.{suffix}"]


def test_frames_that_fail_to_decode_are_missing(tmp_path) -> None:
    path = write_video(tmp_path / "v.mkv", codec="libx264")
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][20]
    path.write_bytes(path.read_bytes().replace(packet, b"\xff" * len(packet)))
    source = open_source(str(path), small)
    scenes = [source.load(i) for i in range(len(source))]
    assert [len(scene.images) for scene in scenes] == [16, 4, 8]
    assert [scene.info.num_frames for scene in scenes] == [16, 4, 8]
    assert [[failure.key for failure in scene.failures] for scene in scenes] == [[], ["v.mkv/clip-0001"], []]
    assert "v.mkv: 12 of 16 frames are missing: it can't be decoded" in scenes[1].failures[0].reason


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


def test_playlist_named_as_a_video_is_not_followed(tmp_path) -> None:
    write_video(tmp_path / "other.mkv", frames=3)
    (tmp_path / "v.mp4").write_text("ffconcat version 1.0\nfile other.mkv\n")
    with pytest.raises(UserError, match=r"no usable video \(v\.mp4: can't be opened"):
        open_source(str(tmp_path / "v.mp4"), small)


def test_relative_video_name_may_have_a_colon(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "12:30.mp4", frames=3)
    assert len(open_source("12:30.mp4", small).load(0).images) == 3


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


def test_truncated_gif_loses_its_last_frame(tmp_path) -> None:
    images = [PIL.Image.fromarray(photo(seed=i)) for i in range(4)]
    data = encode_image(images[0], "GIF", save_all=True, append_images=images[1:], duration=100)
    (tmp_path / "a.gif").write_bytes(data)
    whole = open_source(str(tmp_path / "a.gif"), small)
    assert not whole.skipped
    (tmp_path / "a.gif").write_bytes(data[:-700])
    source = open_source(str(tmp_path / "a.gif"), small)
    assert [failure.key for failure in source.skipped] == ["a.gif"]
    np.testing.assert_array_equal(source.load(0).images, whole.load(0).images[:3])


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


def test_video_source_pickles(tmp_path) -> None:
    source = open_source(str(write_video(tmp_path / "v.mp4", frames=3)), small, {"derived": ("noisy",)})
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(0).images, source.load(0).images)
