"""Image source of video files: clips of frames, chosen by the frames' own times."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource, PathConfig
from lvm.data.images.sources.image_file import UnreadableError
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.images.sources.video_file import Packets, Video, decode_frames, read_packets
from lvm.data.streams.codecs import Image

_ROUNDING_S = 0.001  # seconds by which Matroska rounds a frame's time
_MAX_LAST_S = 1  # seconds by which a steady video's last frame may be longer than the others
_DAY_S = 24 * 3600
_FOREVER = 1 << 62

Clip = tuple[Video, Int64[np.ndarray, " T"]]  # with the times of its frames


@dataclasses.dataclass(frozen=True)
class VideoConfig(PathConfig):
    """Parameters of a video source."""

    rate: float = 0.0  # fps that videos are sampled at; 0, or more than a video's own, takes every frame once
    stride: int = 1  # step between the sampled frames that are used
    clip_frames: int = 16  # maximum frames per scene; longer videos are cut into clips

    def __post_init__(self) -> None:
        check_non_negative(self, "rate")
        check_positive(self, "stride", "clip_frames")


class VideoSource(ImageSource[Clip]):
    """An `ImageSource` of video files. FFmpeg decodes each clip from the keyframe before it.

    A clip is the scene "FILE/clip-0000" of one stream, rgb, in the group FILE. With a `rate`, its frames are those on
    screen at equal time steps, the last one until the stream ends; so one rate applies to all videos. Without, or with
    a step that is shorter than any frame lasts, they are the frames that there are. Listing reads every file once,
    without decoding: packets that are damaged, or missing at the end, are listed. Frames that can't be decoded are
    missing from their scene and listed; no other frame replaces them.
    """

    kind = "video"
    config_class = VideoConfig
    scene_noun = "video"
    streams = {"rgb": Image()}  # noqa: RUF012

    def load(self, index: int) -> SceneImages:
        info, (video, times) = self._scene(index)
        frames: dict[int, np.ndarray] = {}  # time → [1, R, R, 3]
        reason = ""
        try:
            self._folder.local(video.file)
            for time, image in decode_frames(self._root, video, times):
                frames[time] = self._preprocess(image)[None]
        except (UnreadableError, UserError) as error:
            reason = str(error)
        kept = [frames[time] for time in times.tolist() if time in frames]
        text = f"{video.file}: {len(times) - len(kept)} of {len(times)} frames are missing: {reason}"
        return self._scene_images(info, kept, [text] if reason else [])

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        _, (video, times) = self._scene(index)
        try:
            self._folder.local(video.file)
            ((_, image),) = decode_frames(self._root, video, times[frame : frame + 1])
            return preprocess(image)
        except (UnreadableError, UserError, ValueError) as error:
            raise UnreadableError(f"{video.file}: {error}") from error

    def describe(self) -> dict[str, Any]:
        return super().describe() | {key: value for key, value in to_json(self.config).items() if key != "path"}

    def _list_file(self, file: str) -> Iterator[tuple[SceneInfo, Clip]]:
        self._folder.local(file)
        packets = read_packets(self._root, file)
        times, size = self._sample(packets), self.config.clip_frames
        if packets.problem:
            self._skip(file, packets.problem)
        for clip, first in enumerate(range(0, len(times), size)):
            part = times[first : first + size]
            yield SceneInfo(f"{file}/clip-{clip:04d}", file, "", len(part), ("rgb",)), (packets.video, part)

    def _sample(self, packets: Packets) -> Int64[np.ndarray, " T"]:
        """Returns the times of the used frames; with a rate, that of a frame that stays on screen several times."""
        video, times, end = packets.video, packets.times, packets.end
        unit, gaps = float(video.time_base), np.diff(times)
        rounding, stride, rate = _ROUNDING_S / unit, self.config.stride, self.config.rate * unit  # per unit of time
        is_steady = gaps.max(initial=0) <= 1.5 * gaps.min(initial=_FOREVER) + rounding
        is_steady &= end - times[-1] <= 1.5 * gaps.max(initial=0) + _MAX_LAST_S / unit
        if not rate or (is_steady and 1 / rate <= gaps.min(initial=_FOREVER) + rounding):
            return times[::stride]
        count = max(1, math.ceil((end - times[0] - rounding) * rate / stride))
        if video.seconds(end) > _DAY_S and count > (self._root / video.file).stat().st_size:
            raise UnreadableError(f"damaged: its frames last {video.seconds(end):.0f} s, of so few bytes a day at most")
        shown = np.arange(count) * stride / rate + rounding
        return times[np.searchsorted(times - times[0], shown, side="right") - 1]
