"""Damaged video files: copies of ten kinds with a byte changed end in listed failures, in bounded time."""

import pytest

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.video import VideoSource
from tests.fuzz import check_mutations
from tests.video_files import write_video

small = Preprocess(16)
KINDS = {  # container → codec, B-frames, options of the container
    "mp4": ("libx264", 2, {}),
    "mov": ("mpeg4", 0, {"movflags": "faststart"}),
    "m4v": ("mpeg4", 0, {"movflags": "frag_keyframe+empty_moov"}),
    "mkv": ("libx264", 2, {}),
    "webm": ("libvpx", 0, {}),
    "avi": ("mpeg4", 2, {}),
    "ts": ("mpeg2video", 2, {}),
    "mpg": ("mpeg1video", 0, {}),
    "flv": ("flv1", 0, {}),
    "wmv": ("wmv2", 0, {}),
}


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", KINDS)
def test_damaged_video_is_refused_or_listed(tmp_path, suffix, count) -> None:
    codec, b_frames, options = KINDS[suffix]
    path = tmp_path / f"v.{suffix}"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for rate in (0.0, 5.0):
            source = VideoSource(small, path=str(path), rate=rate, clip_frames=8)
            for index in {0, 1, len(source) - 1} & set(range(len(source))):
                scene = source.load(index)
                assert scene.failures or len(scene.images) == scene.info.num_frames

    content = write_video(path, 20, 25, 5, codec, b_frames=b_frames, options=options).read_bytes()
    check_mutations(content, read, count=count)
