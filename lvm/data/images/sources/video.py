"""Scenes from video files: clips of frames at a constant rate."""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import av
import numpy as np
import PIL.Image

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import MAX_PIXELS, UnreadableError
from lvm.data.images.sources.listing import VIDEO_SUFFIXES, check_index, find_files, hash_files
from lvm.data.streams.codecs import Codec, Image

_WORTH_SEEKING = fractions.Fraction(1)  # seconds; below, a video is decoded from its start
_TURNS = {
    1: PIL.Image.Transpose.ROTATE_90,
    2: PIL.Image.Transpose.ROTATE_180,
    3: PIL.Image.Transpose.ROTATE_270,
}


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """The parameters of video files.

    Attributes:
      path: a video, a folder of them, or a pattern.
      rate: frames a second that are looked at; a video with fewer, or 0, gives all that it has.
      stride: of these frames every so manieth is taken.
      clip_frames: a video is cut into scenes of at most so many of those taken.
    """

    kind: ClassVar[str] = "video"
    path: str = ""
    rate: float = 0.0
    stride: int = 1
    clip_frames: int = 16

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise UserError(f"rate: {self.rate} is negative; expected frames a second, or 0 for all")
        for key in ("stride", "clip_frames"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)} is too small; it must be at least 1")


class Video(NamedTuple):
    """A video file, as its header tells.

    Attributes:
      file: its path in the source.
      rate: its own frames a second.
      duration: in seconds.
    """

    file: str
    rate: fractions.Fraction
    duration: fractions.Fraction


class VideoSource:
    """An `ImageSource` of video files, decoded by FFmpeg from the keyframe before a clip on.

    A clip is the scene "FILE/clip-0000", of one stream, rgb, in the group FILE. Its frames are those that are shown at
    equal steps of time, so one rate holds for all videos, whatever their own. Frames that a file ends before, or that
    can't be decoded, are missing from their scene and listed; no other frame takes their place. A recorded rotation
    is applied.

    Args:
      preprocess: how pictures become images.
      **parameters: the fields of `VideoConfig`.

    Raises:
      UserError: there is no such file, or no video that can be opened.
    """

    classes: tuple[str, ...] = ()
    stream_sets: tuple[tuple[str, ...], ...] = (("rgb",),)

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: VideoConfig = from_config_dict(VideoConfig, parameters, "video")
        self._preprocess = preprocess
        self.streams: Mapping[str, Codec] = {"rgb": Image()}
        skipped: list[Failure] = []
        self._root, files = find_files(self.config.path, VIDEO_SUFFIXES, skipped)
        self._clips: list[tuple[SceneInfo, Video, int]] = []  # info, video, number of the first frame
        for file in files:
            try:
                self._clips += self._cut(probe(self._root, file))
            except UnreadableError as error:
                skipped.append(Failure(file, str(error)))
        if not self._clips:
            raise UserError(
                f"{self.config.path}: no video can be opened; the last, {files[-1]}: {skipped[-1].reason}"
            )
        self.name = self._root.resolve().name
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._clips)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        check_index(index, len(self))
        return self._clips[index][0]

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        info = self.info(index)
        _, video, first = self._clips[index]
        step = self._step(video)
        times = [k * step + _later(video) for k in range(first, first + info.num_frames)]
        images, reason = [], ""
        try:
            for picture in frames_at(self._root / video.file, times, video.rate):
                images.append(self._preprocess(picture))
        except (UnreadableError, UserError) as error:
            reason = str(error)
        R = self._preprocess.resolution
        stacked = np.stack(images)[:, None] if images else np.empty((0, 1, R, R, 3), np.uint8)
        failures: tuple[Failure, ...] = ()
        if len(images) < info.num_frames:
            missing = f"{info.num_frames - len(images)} of {info.num_frames} frames are missing"
            failures = (Failure(info.key, f"{video.file}: {missing}: {reason}"),)
        return SceneImages(
            dataclasses.replace(info, num_frames=len(images)), stacked, failures
        )  # [T, 1, R, R, 3]

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        files = dict.fromkeys(video.file for _, video, _ in self._clips)
        fields = {key: value for key, value in to_json(self.config).items() if key != "path"}
        return fields | {"num_scenes": len(self), "listing": hash_files(self._root, files)}

    def _step(self, video: Video) -> fractions.Fraction:
        """Seconds between two frames that are taken."""
        wanted = fractions.Fraction(self.config.rate).limit_denominator(10**6) or video.rate
        return self.config.stride / min(wanted, video.rate)

    def _cut(self, video: Video) -> Iterator[tuple[SceneInfo, Video, int]]:
        count = max(1, math.ceil((video.duration - _later(video)) / self._step(video)))
        for clip, first in enumerate(range(0, count, self.config.clip_frames)):
            frames = min(self.config.clip_frames, count - first)
            yield SceneInfo(f"{video.file}/clip-{clip:04d}", video.file, "", frames, ("rgb",)), video, first


def _later(video: Video) -> fractions.Fraction:
    """Seconds after a frame's time to look for it: a time stamp that was rounded up must not show the one before."""
    return 1 / (4 * video.rate)


def probe(root: pathlib.Path, file: str) -> Video:
    """What a video's header tells; where it tells no length, the file is read through without decoding.

    Raises:
      UnreadableError: not a video, one without length, or of too many pixels.
    """
    with _open(root / file) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate or stream.time_base is None:
            raise UnreadableError("it tells no frame rate")
        if stream.codec_context is None:
            raise UnreadableError("there is no decoder of its codec")
        pixels = stream.codec_context.width * stream.codec_context.height
        if not 0 < pixels <= MAX_PIXELS:
            raise UnreadableError(f"its frames have {pixels} pixels; expected 1 to {MAX_PIXELS}")
        if stream.frames:
            duration = stream.frames / rate
        elif stream.duration:
            duration = stream.duration * stream.time_base
        elif container.duration:
            duration = fractions.Fraction(container.duration, av.time_base)
        else:
            duration = sum(1 for packet in container.demux(stream) if packet.size) / rate
        if duration * rate > (size := (root / file).stat().st_size):
            raise UnreadableError(
                f"damaged: its header tells of {float(duration * rate):.0f} frames in {size} bytes"
            )
        return Video(file, rate, duration)


def frames_at(
    path: pathlib.Path, times: Sequence[fractions.Fraction], rate: fractions.Fraction
) -> Iterator[PIL.Image.Image]:
    """The frames that a video shows at ascending times, in seconds from its start.

    Args:
      path: the video.
      times: each gives a frame.
      rate: the video's own, for how long its last frame is shown.

    Raises:
      UnreadableError: after the frames that there are, it ends or can't be decoded before the others.
    """
    done, end = 0, fractions.Fraction(0)
    shown: tuple[fractions.Fraction, Any] | None = None
    try:
        for following in _decode(path, times[0]):
            while shown is not None and done < len(times) and shown[0] <= times[done] < following[0]:
                yield _picture(shown[1])
                done += 1
            if done == len(times):
                return
            shown, end = following, following[0] + 1 / rate
        while shown is not None and done < len(times) and shown[0] <= times[done] < end:  # the last one
            yield _picture(shown[1])
            done += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(f"it can't be decoded at {float(end):.2f} s: {_reason(error)}") from error
    if done < len(times):
        raise UnreadableError(f"the file ends early, at {float(end):.2f} s")


def _decode(path: pathlib.Path, time: fractions.Fraction) -> Iterator[tuple[fractions.Fraction, Any]]:
    """Frames from the keyframe before `time` on, each with the time in seconds that it is shown from."""
    for start in (time, fractions.Fraction(0)) if time > _WORTH_SEEKING else (time,):
        with _open(path) as container:
            stream = container.streams.video[0]
            origin = stream.start_time or 0
            if start > _WORTH_SEEKING:
                with contextlib.suppress(
                    av.FFmpegError, OSError
                ):  # some files can only be read from the start
                    container.seek(origin + int(start / stream.time_base), stream=stream)
            for number, frame in enumerate(container.decode(stream)):
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is None:
                    raise UnreadableError("its frames have no times")
                begin = (stamp - origin) * stream.time_base
                if number == 0 and begin > time and start > _WORTH_SEEKING:
                    break  # some formats are sought in by guessing: from the start, then
                yield begin, frame
            else:
                return


def _picture(frame: Any) -> PIL.Image.Image:
    """A frame as it is to be seen. Raises UnreadableError for one that was patched up from what was readable of it."""
    if frame.is_corrupt:
        raise UnreadableError(f"the frame at {frame.time:.2f} s is damaged")
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    picture = frame.to_image()
    return picture.transpose(_TURNS[turns]) if turns else picture


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(f"can't be opened: {_reason(error)}") from error
    with container:
        if not container.streams.video:
            raise UnreadableError("holds no video")
        yield container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
