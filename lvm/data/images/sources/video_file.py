"""Frames of a video file: their times by its packets, and their pixels."""

import contextlib
import fractions
import os
import pathlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
from av.stream import Disposition
from jaxtyping import Int64

from lvm.data.images.sources.image_file import MAX_PIXELS, UnreadableError
from lvm.data.images.sources.listing import failure_reason

_ERRORS = (av.FFmpegError, OSError, ValueError)
_MIN_SEEK_S = 1  # clips that begin earlier are decoded from the start of the file
_MAX_GAP_S = 1  # a video may end this much before its header says: sound is often longer
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ignore a WebM's alpha
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}  # a playlist would read other files
_SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds all others


class Video(NamedTuple):
    """A video stream of a file. Times are integers in units of `time_base`, as the container has them."""

    file: str  # inside the source
    stream: int
    time_base: fractions.Fraction  # seconds
    origin: int  # time of the first frame
    has_seek: bool

    def seconds(self, time: float) -> float:
        """Returns the seconds from the first frame to `time`."""
        return (time - self.origin) * float(self.time_base)


class Packets(NamedTuple):
    """The frames of a video by its packets, without decoding."""

    video: Video
    times: Int64[np.ndarray, " N"]  # ascending
    end: float  # of the last frame
    problem: str  # why frames are missing, or ""


def read_packets(root: pathlib.Path, file: str) -> Packets:
    """Reads the times of a video's frames; of several video streams, that with the most frames is taken.

    Raises:
      UnreadableError: not a video, no decoder, too many pixels, or no usable frame.
    """
    durations: dict[int, int] = {}  # by time
    problem, last_dts, has_seek = "", 0, True
    with _open(root / file) as container:
        stream = container.streams[index := _main_stream(container, root / file)]
        _check_stream(stream)
        has_slots, max_step_back = _has_slots(container, stream), _MAX_GAP_S / stream.time_base
        try:
            for packet in container.demux(stream):
                time = packet.dts if packet.pts is None or has_slots else packet.pts
                if not packet.size or packet.is_discard:
                    continue
                if time is None or packet.is_corrupt:
                    problem = problem or f"a packet after frame {len(durations)} is damaged or has no time"
                    continue
                dts = last_dts if packet.dts is None else packet.dts
                if durations and last_dts - dts > max_step_back:
                    problem = f"its times go back after frame {len(durations)}; what follows is not used"
                    has_seek = False
                    break
                last_dts, durations[time] = dts, packet.duration or 0
        except _ERRORS as error:
            problem = f"damaged after frame {len(durations)}: {failure_reason(root, error)}"
        if not durations:
            raise UnreadableError(problem or "holds no frame")
        times = np.array(sorted(durations), np.int64)
        video = Video(file, index, stream.time_base, int(times[0]), has_seek)
        end = float(times[-1]) + (durations[int(times[-1])] or int(np.diff(times[-2:]).sum()) or 1)
        header_end = max(end, _header_end(container, stream))
        if not problem and _is_cut(root / file, container, (header_end - end) * float(stream.time_base)):
            problem = f"ends early, after frame {len(times)}"
        if problem and container.format.name == "gif" and len(times) > 1:  # the last frame is drawn in part
            times, end = times[:-1], float(times[-1])
        return Packets(video, times, end if problem else header_end, problem)


def decode_frames(
    root: pathlib.Path, video: Video, times: Int64[np.ndarray, " T"]
) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Yields the frames at ascending times, each once with its time. A time without a frame of its own is left out.

    Raises:
      UnreadableError: the video ends or can't be decoded before the last of the times, after the frames before.
    """
    expected, last, time = set(times.tolist()), int(times[-1]), video.origin
    try:
        for time, frame in _decode(root / video.file, video, int(times[0])):
            if time in expected:
                yield time, _to_image(frame)
            if time >= last:
                return
    except _ERRORS as error:
        text = failure_reason(root, error)
        raise UnreadableError(f"it can't be decoded after {video.seconds(time):.2f} s: {text}") from error
    raise UnreadableError(f"it can't be decoded after {video.seconds(time):.2f} s")


def _decode(path: pathlib.Path, video: Video, first: int) -> Iterator[tuple[int, Any]]:
    """Yields each frame with its time, from the keyframe before `first` on."""
    starts = [first, None] if video.has_seek and video.seconds(first) > _MIN_SEEK_S else [None]
    for start in starts:
        with _open(path) as container:
            frames = _decode_packets(container, stream := container.streams[video.stream])
            if start is not None:
                try:
                    container.seek(start, stream=stream)
                    head = next(frames)
                except (*_ERRORS, StopIteration):  # some files can only be read from the start
                    continue
                if head[0] > start:  # an imprecise seek went too far
                    continue
                yield head
            yield from frames
            return


def _decode_packets(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
        decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
    decoder.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than the header says
    slots: deque[int] = deque()
    for packet in container.demux(stream):
        if not packet.size and packet.dts is not None:
            continue  # a repeated frame of an AVI; to a decoder an empty packet is the end
        slots.append(packet.dts)
        for frame in decoder.decode(packet):
            time = frame.dts if frame.pts is None else frame.pts
            if _has_slots(container, stream):
                time = slots.popleft() if slots else None
            if time is not None:
                yield time, frame


def _has_slots(container: Any, stream: Any) -> bool:
    """Returns whether frames are shown in the order of their packets: an AVI has no presentation times."""
    return container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc")


def _main_stream(container: Any, path: pathlib.Path) -> int:
    """Returns the index of the video stream with the most frames: a cover picture or thumbnails may come first."""
    counts = Counter({s.index: 0 for s in container.streams.video if not s.disposition & _PICTURES})
    if not counts:
        raise UnreadableError("holds no video")
    if len(counts) > 1:
        with _open(path) as again, contextlib.suppress(*_ERRORS):  # reported when the stream's packets are read
            counts.update(packet.stream_index for packet in again.demux(*counts) if packet.size)
    return max(counts, key=counts.__getitem__)


def _header_end(container: Any, stream: Any) -> float:
    """Returns the end of a stream by its container's header, in units of its time base; 0 if that doesn't tell."""
    if container.format.name == "avi":
        return float(stream.frames)  # its duration is estimated from the file's size
    if stream.duration:
        return float((stream.start_time or 0) + stream.duration)
    seconds = container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0
    with contextlib.suppress(ValueError):  # Matroska's statistics, by other programs in other forms
        hours, minutes, rest = stream.metadata.get("DURATION", "").split(":")
        seconds = 3600 * int(hours) + 60 * int(minutes) + float(rest)
    return seconds / float(stream.time_base)


def _is_cut(path: pathlib.Path, container: Any, missing_s: float) -> bool:
    """Tells a cut file from one whose last frame lasts long, if its header's duration is `missing_s` after the end."""
    if container.format.name == "gif":
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b";"
    if "matroska" not in container.format.name or not missing_s:
        return missing_s > _MAX_GAP_S  # others tell how long each frame lasts, or are steady
    with path.open("rb") as file:
        head = file.read(4096) + bytes(16)
    start = head.find(_SEGMENT) + len(_SEGMENT)
    length = 9 - head[start].bit_length()  # of its size, in bytes; a size of all ones is that of a live stream
    size = int.from_bytes(head[start : start + length]) & (1 << 7 * length) - 1
    return size + 1 < 1 << 7 * length and start + length + size > path.stat().st_size


def _check_stream(stream: Any) -> None:
    if stream.codec_context is None:
        raise UnreadableError("no decoder for its codec")
    if not stream.time_base:
        raise UnreadableError("its times have no unit")
    pixels = stream.codec_context.width * stream.codec_context.height
    if not 0 < pixels <= MAX_PIXELS:
        raise UnreadableError(f"its frames have {pixels} pixels; expected 1 to {MAX_PIXELS}")


def _to_image(frame: Any) -> PIL.Image.Image:
    """Returns a frame as an upright image. Raises UnreadableError for one that FFmpeg concealed errors in."""
    if frame.is_corrupt:
        raise UnreadableError("a frame is damaged")
    is_transparent = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    image = PIL.Image.fromarray(frame.to_ndarray(format="rgba")) if is_transparent else frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # (x, y) ↦ (a x + c y, b x + d y)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(PIL.Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    try:
        container = av.open(str(path.absolute()), options=_OPTIONS)  # a relative "a:b.mp4" would name a protocol
    except _ERRORS as error:
        raise UnreadableError(f"can't be opened: {failure_reason(path.parent, error)}") from error
    with container:
        yield container
