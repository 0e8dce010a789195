"""Image source of a folder: photos, videos as folders of frames, and annotations in parallel folders."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.validation import check_choice, check_positive
from lvm.data.images.sources.base import ImageFileSource, PathConfig
from lvm.data.images.sources.finding import hash_files, open_folder
from lvm.data.images.sources.image_file import ImageFile, UnreadableError, open_image
from lvm.data.images.sources.listing import IMAGE_SUFFIXES, SETTINGS_FILES, suffix_of
from lvm.data.images.sources.readers import STREAMS
from lvm.data.images.sources.scene import SceneInfo

_EXPECTED = (
    f"expected a folder of photos ({', '.join(IMAGE_SUFFIXES)}), of videos (folders of frames), or with a folder "
    f"for each stream: rgb/ and any of {', '.join(STREAMS[1:])}"
)

_SAMPLED = 8  # subfolders, and images of each, that tell their layout
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")  # folders around those of classes

Frame = dict[str, str]  # stream → file, relative to the root


@dataclasses.dataclass(frozen=True)
class FolderConfig(PathConfig):
    """Parameters of a folder source.

    Attributes:
      clip_frames: maximum frames per scene; longer videos are cut into clips.
      layout: of subfolders: "videos" (frames), "classes" (photos of a class each), or "auto", which tells them apart.
    """

    clip_frames: int = 16
    layout: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "clip_frames")
        check_choice(self, "layout", ("auto", "videos", "classes"))


def _class_name(folder: str) -> str:
    """Returns the class of photos in a subfolder: its first part, or its second after that of a split."""
    first, *others = folder.split("/")
    return (others or [""])[0] if first.lower() in _SPLITS else first


class FolderSource(ImageFileSource[list[Frame]]):
    """An `ImageSource` of the image files in a folder.

    Layouts: photos directly in the folder are scenes of one frame, grouped by their path. A subfolder, however deep,
    is a video: its files in natural order (2 before 10) are cut into clips with the keys "video/clip-0000", …, and the
    video is their group. With the layout "classes" its files are photos too, of the class "cat" in "cat/…" and in
    "train/cat/…". "auto" takes subfolders for classes if their images have three sizes or more, for videos if they have
    one and are evenly numbered. If there is a subfolder `rgb`, it contains both kinds, and its siblings named after
    streams hold annotations under the same paths and stems. A scene has the streams that every one of its frames has.

    Annotations: `segmentation` holds class ids (modes 1, L, P; a mask may be 0 and 255) or exact RGB colors, named by
    `classes.json`; `depth` holds 16-bit millimeters (0 and 65535: no reading) or rendered 8-bit gray; the others are
    images. `streams.json` overrides codec parameters by stream, such as {"depth": {"near": 400, "far": 5000}}.

    Raises:
      UserError: also if the files of subfolders tell no layout, some tell videos and some classes, or they tell videos
        in "train/cat/…", the layout of classes.
    """

    kind = "folder"
    config_class = FolderConfig

    def describe(self) -> dict[str, Any]:
        files = (item for _, clip in self._scenes for frame in clip for item in sorted(frame.items()))
        names = ((f"{stream} {file}", file) for stream, file in files)
        return super().describe() | {
            "clip_frames": self.config.clip_frames,
            "num_frames": sum(info.num_frames for info, _ in self._scenes),
            "listing": hash_files(self._folder, names, tail_bytes=256),
            **({"layout": self._layout} if self._layout != "videos" else {}),
        }

    def _open_scene(self, index: int) -> tuple[SceneInfo, Iterable[dict[str, ImageFile]]]:
        info, clip = self._scene(index)
        return info, ({s: self._image(file) for s, file in frame.items()} for frame in clip)

    def _image(self, file: str) -> ImageFile:
        return ImageFile(file, self._folder.content(file))

    def _list_scenes(self) -> Iterator[tuple[SceneInfo, list[Frame]]]:
        """Yields photos first, then clips of videos, in natural order."""
        folder = open_folder(self.config.path)
        if folder is None:
            text = "a file" if os.path.exists(self.config.path) else "nothing"
            raise UserError(f"{self.config.path}: found {text} there; {_EXPECTED}")
        self._set_folder(folder)
        has_streams = folder.is_folder("rgb")
        videos: dict[str, list[Frame]] = {}  # video → frames; photos are under ""
        for (video, _), frame in self._list_frames(has_streams).items():
            videos.setdefault(video, []).append(frame)
        self._check_readable(frame for frames in videos.values() for frame in frames)
        self._layout = self._find_layout({video: frames for video, frames in videos.items() if video})
        photos = list(videos) if self._layout == "classes" else [""]
        for photo_folder in photos:
            for photo in videos.pop(photo_folder, []):
                key = photo["rgb"].removeprefix("rgb/" if has_streams else "")
                yield SceneInfo(key, key, _class_name(photo_folder), 1, tuple(photo)), [photo]
        size = self.config.clip_frames
        for video, frames in videos.items():
            for start in range(0, len(frames), size):
                clip = frames[start : start + size]
                key = f"{video}/clip-{start // size:04d}"
                yield SceneInfo(key, video, "", len(clip), self._complete_streams(key, clip)), clip

    def _find_layout(self, folders: dict[str, list[Frame]]) -> str:
        """Returns "classes" or "videos". Raises UserError if the images of subfolders tell neither."""
        layout = self.config.layout
        if layout == "auto":
            step = math.ceil(len(folders) / _SAMPLED) or 1
            kinds = {self._kind(frames[:_SAMPLED]) for frames in list(folders.values())[::step]} - {""}
            kinds = kinds - {"unknown"} or kinds
            is_split = all("/" in folder and _class_name(folder) != folder.split("/")[0] for folder in folders)
            if len(kinds) > 1 or kinds == {"unknown"} or (folders and is_split and kinds != {"classes"}):
                raise UserError(
                    f"{self._folder}: its subfolders may be videos (folders of frames) or classes (folders of photos); "
                    'give layout="videos" or layout="classes", in a config file with kind="folder" (docs/data.md)'
                )
            layout = kinds.pop() if kinds else "videos"
        if folders:
            item, other = ("frames", "classes") if layout == "videos" else ("photos", "videos")
            text = f"{len(folders)} subfolders read as {layout}, of {sum(map(len, folders.values()))} {item}"
            log_info(f'{self._folder}: {text}; layout="{other}" reads them as {other}')
        return layout

    def _kind(self, frames: list[Frame]) -> str:
        """Returns the layout that the first images of a subfolder tell; "unknown", or "" if there are too few."""
        sizes = []
        for frame in frames:
            with contextlib.suppress(UnreadableError), open_image(self._folder.content(frame["rgb"])) as image:
                sizes.append(image.size)
        if len(sizes) < 2:
            return ""
        if len(set(sizes)) > 1:  # a video may change its size once
            return "classes" if len(set(sizes)) > 2 else "unknown"
        names = [re.split(r"(\d+)", pathlib.PurePath(frame["rgb"]).stem) for frame in frames]
        varying = [parts for parts in zip(*names, strict=False) if len(set(parts)) > 1]
        if len(set(map(len, names))) > 1 or len(varying) != 1 or not all(part.isdecimal() for part in varying[0]):
            return "unknown"
        steps = Counter(np.diff([int(part) for part in varying[0]]).tolist())
        return "videos" if max(steps.values()) * 2 >= steps.total() else "unknown"  # some frames may be missing

    def _list_frames(self, has_streams: bool) -> dict[tuple[str, str], Frame]:
        """Returns the frames by (folder, stem or name), each with its files by stream."""
        folders = {"rgb": ""}
        if has_streams:
            folders = {stream: stream for stream in self._stream_names if self._folder.is_folder(stream)}
            self._skip_siblings(folders)
        by_stem = len(folders) > 1
        frames: dict[tuple[str, str], Frame] = {}
        for stream, folder in folders.items():  # rgb comes first
            for name, file in self._list_images(folder, by_stem).items():
                if stream == "rgb":
                    frames[name] = {"rgb": file}
                elif name in frames:
                    frames[name][stream] = file
                else:
                    self._skip(file, f"no rgb/{'/'.join(filter(None, name))} with any image suffix")
        return frames

    def _list_images(self, tree: str, by_stem: bool) -> dict[tuple[str, str], str]:
        """Returns the image files under root/tree by (folder, stem), or by (folder, name) unless `by_stem`."""
        skip = lambda path, reason: self._skip(pathlib.PurePath(tree, path).as_posix(), reason)  # noqa: E731
        files: dict[tuple[str, str], str] = {}
        for folder, name in self._folder.walk(skip, tree):
            file = "/".join(filter(None, (tree, folder, name)))
            key = (folder, pathlib.PurePath(name).stem if by_stem else name)
            if suffix_of(name) not in IMAGE_SUFFIXES:
                if file not in SETTINGS_FILES:
                    self._skip(file, "not an image file")
            elif not tree and folder.split("/")[0] in STREAMS:
                self._skip(file, "an annotation without rgb; the photos belong in a folder rgb/")
            elif key in files:
                self._skip(file, f"has the stem of {files[key]}, which is used")
            else:
                files[key] = file
        return files

    def _complete_streams(self, key: str, clip: list[Frame]) -> tuple[str, ...]:
        counts = Counter(stream for frame in clip for stream in frame)
        for stream, count in counts.items():
            if count < len(clip):
                self._skip(key, f"{stream} is left out: only {count} of {len(clip)} frames have it")
        return tuple(stream for stream in self._stream_names if counts[stream] == len(clip))

    def _skip_siblings(self, streams: Iterable[str]) -> None:
        for name in self._folder.entries():
            if name in streams or name in SETTINGS_FILES:
                continue
            names = ", ".join(self._stream_names)
            is_folder = self._folder.is_folder(name)
            self._skip(name, f"not the name of a stream ({names})" if is_folder else "is not in a stream's folder")

    def _check_readable(self, frames: Iterable[Frame]) -> None:
        reason = f"it holds no image file; {_EXPECTED}"
        for frame in frames:
            try:
                return open_image(self._folder.content(frame["rgb"])).close()
            except UnreadableError as error:
                reason = f"none of its image files can be opened; the last, {frame['rgb']}: {error}"
        raise UserError(f"{self._folder}: {reason}")
