"""Image source of video files: clips of frames at a constant frame rate."""

import contextlib
import dataclasses
import fractions
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.sources.base import ImageSource, PathConfig, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import MAX_PIXELS, UnreadableError
from lvm.data.images.sources.listing import relative_to
from lvm.data.streams.codecs import Image

_MIN_SEEK_S = fractions.Fraction(1)  # clips that begin earlier are decoded from the start of the file
_ROTATIONS = {turns: PIL.Image.Transpose[f"ROTATE_{90 * turns}"] for turns in (1, 2, 3)}


@dataclasses.dataclass(frozen=True)
class VideoConfig(PathConfig):
    """Parameters of a video source."""

    rate: float = 0.0  # fps that videos are sampled at; 0, or more than a video's own, takes all frames
    stride: int = 1  # step between the sampled frames that are used
    clip_frames: int = 16  # maximum frames per scene; longer videos are cut into clips

    def __post_init__(self) -> None:
        check_non_negative(self, "rate")
        check_positive(self, "stride", "clip_frames")


class Video(NamedTuple):
    """The header of a video at `file` inside the source; `duration` is in seconds."""

    file: str
    fps: fractions.Fraction
    duration: fractions.Fraction


class VideoSource(ImageSource[tuple[Video, int]]):
    """An `ImageSource` of video files. FFmpeg decodes each clip from the keyframe before it.

    A clip is the scene "FILE/clip-0000" of one stream, rgb, in the group FILE. Its frames are those on screen at equal
    time steps, so one frame rate applies to all videos, whatever their own. Frames after a truncated file's end or that
    can't be decoded are missing from their scene and listed; no other frame replaces them. A recorded rotation is
    applied.
    """

    kind = "video"
    config_class = VideoConfig
    scene_noun = "video"
    streams = {"rgb": Image()}  # noqa: RUF012

    def load(self, index: int) -> SceneImages:
        info, (video, first) = self._scene(index)
        step = self._step(video)
        times = [k * step + _slack(video) for k in range(first, first + info.num_frames)]
        frames: list[np.ndarray] = []
        reason = ""
        try:
            for image in frames_at(self._root / video.file, times, video.fps):
                frames.append(self._preprocess(image)[None])  # [1, R, R, 3]
        except (UnreadableError, UserError) as error:
            reason = str(error)
        missing = info.num_frames - len(frames)
        text = f"{video.file}: {missing} of {info.num_frames} frames are missing: {reason}"
        return self._scene_images(info, frames, [text] if missing else [])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {key: value for key, value in to_json(self.config).items() if key != "path"}

    def _list_scenes(self) -> Iterator[tuple[SceneInfo, tuple[Video, int]]]:
        return self._list_files(self._list_file)

    def _list_file(self, file: str) -> Iterator[tuple[SceneInfo, tuple[Video, int]]]:
        """Yields each clip with its video, and its first frame among the used ones."""
        video = probe(self._root, file)
        num_frames = max(1, math.ceil((video.duration - _slack(video)) / self._step(video)))
        for clip, first in enumerate(range(0, num_frames, self.config.clip_frames)):
            frames = min(self.config.clip_frames, num_frames - first)
            yield SceneInfo(f"{file}/clip-{clip:04d}", file, "", frames, ("rgb",)), (video, first)

    def _step(self, video: Video) -> fractions.Fraction:
        """Returns the seconds between two used frames."""
        fps = fractions.Fraction(self.config.rate).limit_denominator(10**6) or video.fps
        return self.config.stride / min(fps, video.fps)


def _slack(video: Video) -> fractions.Fraction:
    """Returns the seconds after a frame's time to look for it: its time stamp may have been rounded up."""
    return 1 / (4 * video.fps)


def probe(root: pathlib.Path, file: str) -> Video:
    """Reads a video's header; if that has no duration, counts the packets without decoding.

    Raises:
      UnreadableError: not a video, no frame rate, too many pixels, or more frames than bytes.
    """
    with _open(root / file) as container:
        stream = container.streams.video[0]
        fps = stream.average_rate or stream.guessed_rate
        if not fps or stream.time_base is None:
            raise UnreadableError("no frame rate")
        if stream.codec_context is None:
            raise UnreadableError("no decoder for its codec")
        pixels = stream.codec_context.width * stream.codec_context.height
        if not 0 < pixels <= MAX_PIXELS:
            raise UnreadableError(f"its frames have {pixels} pixels; expected 1 to {MAX_PIXELS}")
        if stream.frames:
            duration = stream.frames / fps
        elif stream.duration:
            duration = stream.duration * stream.time_base
        elif container.duration:
            duration = fractions.Fraction(container.duration, av.time_base)
        else:
            duration = sum(1 for packet in container.demux(stream) if packet.size) / fps
        if duration * fps > (size := (root / file).stat().st_size):
            raise UnreadableError(f"damaged: {float(duration * fps):.0f} frames in its header, {size} bytes")
        return Video(file, fps, duration)


def frames_at(
    path: pathlib.Path, times: Sequence[fractions.Fraction], fps: fractions.Fraction
) -> Iterator[PIL.Image.Image]:
    """Yields the frames on screen at ascending times, in seconds from the video's start.

    `fps` is the video's own frame rate, for the duration of its last frame.

    Raises:
      UnreadableError: the video ends or can't be decoded before the last of the times, after the frames before.
    """
    done, end = 0, fractions.Fraction(0)
    current: tuple[fractions.Fraction, Any] | None = None
    try:
        for following in _decode(path, times[0]):
            while current is not None and done < len(times) and current[0] <= times[done] < following[0]:
                yield _to_image(current[1])
                done += 1
            if done == len(times):
                return
            current, end = following, following[0] + 1 / fps
        while current is not None and done < len(times) and current[0] <= times[done] < end:  # the last one
            yield _to_image(current[1])
            done += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(
            f"it can't be decoded at {float(end):.2f} s: {relative_to(path.parent, error)}"
        ) from error
    if done < len(times):
        raise UnreadableError(f"the file ends early, at {float(end):.2f} s")


def _decode(path: pathlib.Path, time: fractions.Fraction) -> Iterator[tuple[fractions.Fraction, Any]]:
    """Yields frames from the keyframe before `time` on, each with its start time in seconds."""
    for start in (time, fractions.Fraction(0)) if time > _MIN_SEEK_S else (time,):
        with _open(path) as container:
            stream = container.streams.video[0]
            origin = stream.start_time or 0
            if start > _MIN_SEEK_S:
                with contextlib.suppress(av.FFmpegError, OSError):  # some files can only be read from the start
                    container.seek(origin + int(start / stream.time_base), stream=stream)
            for i, frame in enumerate(container.decode(stream)):
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is None:
                    raise UnreadableError("its frames have no times")
                begin = (stamp - origin) * stream.time_base
                if i == 0 and begin > time and start > _MIN_SEEK_S:
                    break  # an imprecise seek went too far: decode from the start instead
                yield begin, frame
            else:
                return


def _to_image(frame: Any) -> PIL.Image.Image:
    """Returns a frame upright, as RGB or RGBA. Raises UnreadableError for one that FFmpeg concealed errors in."""
    if frame.is_corrupt:
        raise UnreadableError(f"the frame at {frame.time:.2f} s is damaged")
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    image = PIL.Image.fromarray(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_image()
    return image.transpose(_ROTATIONS[turns]) if turns else image


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(f"can't be opened: {relative_to(path.parent, error)}") from error
    with container:
        if not container.streams.video:
            raise UnreadableError("holds no video")
        yield container
