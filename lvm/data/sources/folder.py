"""Scenes from a folder of image files: photos, videos as folders of frames, and their annotations beside."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from lvm.config import from_config_dict
from lvm.data.preprocess import Preprocess
from lvm.data.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.sources.readers import STREAMS, UnreadableError, decode_picture, make_readers, open_picture
from lvm.data.streams import Codec
from lvm.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_SETTINGS = ("classes.json", "streams.json")
_EXPECTED = (
    f"expected a folder of photos ({', '.join(SUFFIXES)}), of videos (folders of frames), or with a folder "
    f"for each stream: rgb/ and any of {', '.join(STREAMS[1:])}"
)

Frame = dict[str, str]  # stream → file, relative to the folder


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """The parameters of a folder.

    Attributes:
      clip_frames: a video is cut into scenes of at most so many frames.
    """

    kind: ClassVar[str] = "folder"
    clip_frames: int = 16

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise UserError(f"clip_frames: {self.clip_frames} is too small; it must be at least 1")


class FolderSource:
    """A `Source` of the files in a folder.

    Layouts: photos directly in the folder are scenes of one frame, grouped by their path. A subfolder,
    however deep, is a video: its files in natural order (2 before 10) are cut into clips with the keys
    "video/clip-0000", … and the video is their group. Where there is a subfolder `rgb`, both kinds are in
    it, and its siblings named after streams hold annotations under the same paths and stems. A scene has
    the streams that exist for each of its frames. Class names of scenes are empty.

    Annotations: `segmentation` holds class ids (modes 1, L, P; a mask may be 0 and 255) or exact colours
    (RGB), named by `classes.json`; `depth` holds 16-bit millimetres, 0 and 65535 for no reading, or 8-bit
    grey as drawn; the others are images. `streams.json` overrides parameters of codecs by stream, such as
    {"depth": {"near": 400, "far": 5000}}.

    Args:
      path: the folder.
      preprocess: how pictures become images.
      **parameters: the fields of `FolderConfig`.

    Raises:
      UserError: when there is no such folder or no usable image in it, when `classes.json` or `streams.json`
        is malformed, or for an unknown parameter.
    """

    def __init__(self, path: str | pathlib.Path, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: FolderConfig = from_config_dict(FolderConfig, parameters, "folder")
        self._root = pathlib.Path(path)
        self._preprocess = preprocess
        if not self._root.is_dir():
            found = "a file" if self._root.exists() else "nothing"
            raise UserError(f"{path}: found {found} there; {_EXPECTED}")
        listing = _Listing(self._root)
        self._scenes = list(listing.scenes(self.config.clip_frames))
        self._check_usable()
        self.name = self._root.resolve().name
        self.skipped = tuple(listing.skipped)
        stream_sets = {info.streams for info, _ in self._scenes}
        self.stream_sets: tuple[tuple[str, ...], ...] = tuple(sorted(stream_sets))
        self.classes: tuple[str, ...] = ()
        used = {stream for streams in stream_sets for stream in streams}
        files = {s: [f[s] for _, clip in self._scenes for f in clip if s in f] for s in STREAMS if s in used}
        self._readers = make_readers(self._root, files)
        self.streams: Mapping[str, Codec] = {stream: reader.codec for stream, reader in self._readers.items()}

    def __len__(self) -> int:
        return len(self._scenes)

    def info(self, index: int) -> SceneInfo:
        """See `Source.info`."""
        return self._scene(index)[0]

    def load(self, index: int) -> SceneImages:
        """See `Source.load`. A failure's key is the scene's; its reason begins with the file."""
        info, clip = self._scene(index)
        images, failures = [], []
        for frame in clip:
            try:
                images.append(self._read_frame(frame, info.streams))
            except UnreadableError as error:
                failures.append(Failure(info.key, str(error)))
        R = self._preprocess.resolution
        stacked = np.stack(images) if images else np.empty((0, len(info.streams), R, R, 3), np.uint8)
        info = dataclasses.replace(info, num_frames=len(images))
        return SceneImages(info, stacked, tuple(failures))  # [T, S, R, R, 3]

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "kind": self.config.kind,
            "clip_frames": self.config.clip_frames,
            "num_scenes": len(self),
            "num_frames": sum(info.num_frames for info, _ in self._scenes),
            "listing": self._listing_hash(),
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
        }

    def _listing_hash(self) -> str:
        """A hash of all files' names, sizes and last bytes: folders are told apart without reading all of them."""
        digest = hashlib.sha256()
        for _, clip in self._scenes:
            for frame in clip:
                for stream, file in sorted(frame.items()):
                    size, end = _size_and_end(self._root / file)
                    digest.update(f"{stream} {file} {size}\n".encode() + end)
        return digest.hexdigest()

    def _scene(self, index: int) -> tuple[SceneInfo, list[Frame]]:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return self._scenes[index]

    def _check_usable(self) -> None:
        reason = f"it holds no image file; {_EXPECTED}"
        for _, clip in self._scenes:
            for frame in clip:
                try:
                    open_picture(self._root / frame["rgb"]).close()
                    return
                except UnreadableError as error:
                    reason = f"none of its image files can be opened; the last, {frame['rgb']}: {error}"
        raise UserError(f"{self._root}: {reason}")

    def _read_frame(self, frame: Frame, streams: tuple[str, ...]) -> np.ndarray:
        """The images of one frame, uint8 [S, R, R, 3]. Raises UnreadableError, naming the file."""
        images: list[np.ndarray] = []
        for stream in streams:
            try:
                picture = decode_picture(self._root / frame[stream])
                if stream == "rgb":
                    rgb_size = picture.size
                elif not _same_aspect(picture.size, rgb_size):
                    (w, h), (rgb_w, rgb_h) = picture.size, rgb_size
                    raise UnreadableError(f"{w}×{h} is of another shape than its rgb, {rgb_w}×{rgb_h}")
                images.append(self._readers[stream].read(picture, self._preprocess))
            except (UnreadableError, UserError) as error:
                raise UnreadableError(f"{frame[stream]}: {error}") from error
        return np.stack(images)  # [S, R, R, 3]


class _Listing:
    """What lies in a folder: frames by video, and what is not used, with the reason."""

    def __init__(self, root: pathlib.Path) -> None:
        self.skipped: list[Failure] = []
        self._root = root
        if (root / "rgb").is_dir():
            trees = {stream: stream for stream in STREAMS if (root / stream).is_dir()}
            self._skip_siblings(trees)
        else:
            trees = {"rgb": ""}
        aligned = len(trees) > 1
        frames: dict[tuple[str, str], Frame] = {}
        for stream, tree in trees.items():  # rgb comes first
            for place, file in self._images(tree, aligned).items():
                if stream == "rgb":
                    frames[place] = {"rgb": file}
                elif place in frames:
                    frames[place][stream] = file
                else:
                    self._skip(file, f"no rgb/{'/'.join(filter(None, place))} with any image suffix")
        self._videos: dict[str, list[Frame]] = {}  # video → frames; photos are under ""
        for (video, _), frame in frames.items():
            self._videos.setdefault(video, []).append(frame)

    def scenes(self, clip_frames: int) -> Iterator[tuple[SceneInfo, list[Frame]]]:
        """Each scene with its frames: photos first, then videos, in natural order."""
        prefix = "rgb/" if (self._root / "rgb").is_dir() else ""
        for photo in self._videos.get("", []):
            key = photo["rgb"].removeprefix(prefix)
            yield SceneInfo(key, key, "", 1, tuple(photo)), [photo]
        for video, frames in self._videos.items():
            for start in range(0, len(frames) if video else 0, clip_frames):
                clip = frames[start : start + clip_frames]
                key = f"{video}/clip-{start // clip_frames:04d}"
                yield SceneInfo(key, video, "", len(clip), self._complete_streams(key, clip)), clip

    def _complete_streams(self, key: str, clip: list[Frame]) -> tuple[str, ...]:
        counts = Counter(stream for frame in clip for stream in frame)
        for stream, count in counts.items():
            if count < len(clip):
                self._skip(key, f"{stream} is left out: only {count} of {len(clip)} frames have it")
        return tuple(stream for stream in STREAMS if counts[stream] == len(clip))

    def _images(self, tree: str, aligned: bool) -> dict[tuple[str, str], str]:
        """The image files under root/tree by (folder, stem) or, if no others go with them, (folder, name)."""
        files: dict[tuple[str, str], str] = {}
        for folder, name in self._walk(self._root / tree):
            file = "/".join(filter(None, (tree, folder, name)))
            place = (folder, pathlib.PurePath(name).stem if aligned else name)
            if pathlib.PurePath(name).suffix.lower() not in SUFFIXES:
                if file not in _SETTINGS:
                    self._skip(file, "not an image file")
            elif not tree and folder.split("/")[0] in STREAMS:
                self._skip(file, "an annotation without rgb; the photos belong in a folder rgb/")
            elif place in files:
                self._skip(file, f"has the stem of {files[place]}, which is used")
            else:
                files[place] = file
        return files

    def _walk(self, top: pathlib.Path) -> Iterator[tuple[str, str]]:
        """All files under `top` but hidden ones as (folder, name), in natural order; links are followed."""
        seen: set[str] = set()
        for folder, subfolders, names in os.walk(top, followlinks=True, onerror=self._skip_folder):
            relative = pathlib.PurePath(folder).relative_to(top).as_posix().removeprefix(".")
            real = os.path.realpath(folder)
            if real in seen:  # a link may lead to a folder that it lies in
                self._skip(relative, "a link to a folder that is listed already")
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted((s for s in subfolders if not s.startswith(".")), key=_natural)
            for name in sorted((n for n in names if not n.startswith(".")), key=_natural):
                yield relative, name

    def _skip_siblings(self, trees: dict[str, str]) -> None:
        for entry in sorted(self._root.iterdir(), key=lambda entry: _natural(entry.name)):
            if entry.name.startswith(".") or entry.name in trees or entry.name in _SETTINGS:
                continue
            if entry.is_dir():
                self._skip(entry.name, f"not the name of a stream ({', '.join(STREAMS)})")
            else:
                self._skip(entry.name, "lies beside rgb/, not in the folder of a stream")

    def _skip_folder(self, error: OSError) -> None:
        folder = pathlib.Path(error.filename).relative_to(self._root).as_posix()
        self._skip(folder, f"can't be listed: {error.strerror}")

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.append(Failure(key, reason))


def _natural(name: str) -> list[str | int]:
    """A sort key that puts frame 2 before frame 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are of one shape, to within a pixel of rounding."""
    (w, h), (other_w, other_h) = size, other
    return abs(w * other_h - other_w * h) <= max(w, h, other_w, other_h)


def _size_and_end(path: pathlib.Path) -> tuple[int, bytes]:
    """A file's size and its last bytes, which in compressed pictures depend on all before; unreadable: none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 256))
            return size, file.read()
    except OSError:
        return 0, b""
