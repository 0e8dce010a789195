"""Scenes from a folder of image files: photos, videos as folders of frames, and their annotations beside."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import IMAGE_SUFFIXES, ImageFile, UnreadableError, open_image
from lvm.data.images.sources.listing import (
    SETTINGS_FILES,
    check_index,
    natural_key,
    size_and_tail,
    walk_files,
)
from lvm.data.images.sources.readers import STREAMS, FrameReader, declared_streams, make_readers
from lvm.data.streams.codecs import Codec

_EXPECTED = (
    f"expected a folder of photos ({', '.join(IMAGE_SUFFIXES)}), of videos (folders of frames), or with a folder "
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
    """An `ImageSource` of the files in a folder.

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
        files = {stream: self._blobs(stream) for stream in listing.streams if stream in used}
        self._frames = FrameReader(make_readers(self._root, files), preprocess)
        self.streams: Mapping[str, Codec] = self._frames.streams

    def __len__(self) -> int:
        return len(self._scenes)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        return self._scene(index)[0]

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`. A failure's key is the scene's; its reason begins with the file."""
        info, clip = self._scene(index)
        return self._frames.load(info, ({s: self._blob(file) for s, file in frame.items()} for frame in clip))

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
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
                    size, end = size_and_tail(self._root / file)
                    digest.update(f"{stream} {file} {size}\n".encode() + end)
        return digest.hexdigest()

    def _scene(self, index: int) -> tuple[SceneInfo, list[Frame]]:
        check_index(index, len(self))
        return self._scenes[index]

    def _blob(self, file: str) -> ImageFile:
        return ImageFile(file, self._root / file)

    def _blobs(self, stream: str) -> Iterator[ImageFile]:
        return (self._blob(frame[stream]) for _, clip in self._scenes for frame in clip if stream in frame)

    def _check_usable(self) -> None:
        reason = f"it holds no image file; {_EXPECTED}"
        for _, clip in self._scenes:
            for frame in clip:
                try:
                    open_image(self._root / frame["rgb"]).close()
                    return
                except UnreadableError as error:
                    reason = f"none of its image files can be opened; the last, {frame['rgb']}: {error}"
        raise UserError(f"{self._root}: {reason}")


class _Listing:
    """What lies in a folder: frames by video, and what is not used, with the reason."""

    def __init__(self, root: pathlib.Path) -> None:
        self.skipped: list[Failure] = []
        self.streams: tuple[str, ...] = STREAMS
        self._root = root
        if (root / "rgb").is_dir():
            self.streams = (*STREAMS, *declared_streams(root))
            trees = {stream: stream for stream in self.streams if (root / stream).is_dir()}
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
        return tuple(stream for stream in self.streams if counts[stream] == len(clip))

    def _images(self, tree: str, aligned: bool) -> dict[tuple[str, str], str]:
        """The image files under root/tree by (folder, stem) or, if no others go with them, (folder, name)."""
        files: dict[tuple[str, str], str] = {}
        for folder, name in walk_files(self._root / tree, self._skip_folder):
            file = "/".join(filter(None, (tree, folder, name)))
            place = (folder, pathlib.PurePath(name).stem if aligned else name)
            if pathlib.PurePath(name).suffix.lower() not in IMAGE_SUFFIXES:
                if file not in SETTINGS_FILES:
                    self._skip(file, "not an image file")
            elif not tree and folder.split("/")[0] in STREAMS:
                self._skip(file, "an annotation without rgb; the photos belong in a folder rgb/")
            elif place in files:
                self._skip(file, f"has the stem of {files[place]}, which is used")
            else:
                files[place] = file
        return files

    def _skip_siblings(self, trees: dict[str, str]) -> None:
        for entry in sorted(self._root.iterdir(), key=lambda entry: natural_key(entry.name)):
            if entry.name.startswith(".") or entry.name in trees or entry.name in SETTINGS_FILES:
                continue
            if entry.is_dir():
                self._skip(entry.name, f"not the name of a stream ({', '.join(self.streams)})")
            else:
                self._skip(entry.name, "lies beside rgb/, not in the folder of a stream")

    def _skip_folder(self, folder: pathlib.Path, reason: str) -> None:
        self._skip(folder.relative_to(self._root).as_posix(), reason)

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.append(Failure(key, reason))
