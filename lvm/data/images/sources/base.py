"""Scenes, and the base classes of what lists and loads them: image sources and code sources."""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8, UInt16

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import listing
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.readers import STREAMS, Reader, declared_streams, make_readers, read_frame
from lvm.data.streams.codecs import Codec

Location = TypeVar("Location")  # where a scene's data is, as its source needs it


@dataclasses.dataclass(frozen=True)
class Failure:
    """Data that is not used, and why."""

    key: str  # a path inside the source, a scene, or a frame of a scene
    reason: str


@dataclasses.dataclass(frozen=True)
class SceneInfo:
    """Metadata of a scene, known without decoding."""

    key: str  # identifies the scene within its source
    group: str  # the original photo or video; a split never separates scenes of one group
    class_name: str  # class label, or ""
    num_frames: int  # T
    streams: tuple[str, ...]  # in the order of the scene's images


@dataclasses.dataclass(frozen=True)
class SceneImages:
    """A decoded scene."""

    info: SceneInfo  # `num_frames` counts the frames in `images`
    images: UInt8[np.ndarray, "T S R R 3"]  # streams in the order of `info.streams`; T may be 0
    failures: tuple[Failure, ...] = ()  # frames that could not be read and were dropped


@dataclasses.dataclass(frozen=True)
class SceneCodes:
    """A scene that is stored as codes; otherwise as `SceneImages`."""

    info: SceneInfo
    codes: UInt16[np.ndarray, "T S N"]
    failures: tuple[Failure, ...] = ()


@dataclasses.dataclass(frozen=True)
class PathConfig:
    """Parameters of a source of files. `path` is a file, a folder, or a pattern such as "data/train-*.parquet"."""

    path: str = ""


class SceneSource(abc.ABC, Generic[Location]):
    """Base class of all sources: scenes by index, listed up front without decoding.

    A subclass sets the class attributes and overrides `_list_scenes`, by `_list_files` if each file has scenes of its
    own. A source is pickled for worker processes without its `unpicklable` attributes, which `_reset` sets.

    Args:
      preprocess: converts decoded images to the model's size.
      **parameters: the fields of `config_class`.

    Raises:
      UserError: an unknown parameter, an impossible value, or no usable scene.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type] = PathConfig  # a frozen dataclass
    required: ClassVar[tuple[str, ...]] = ("path",)  # parameters that must not be empty
    scene_noun: ClassVar[str] = "scene"  # for "found no usable …"
    read_errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)  # skip a file that can't be listed
    unpicklable: ClassVar[tuple[str, ...]] = ()

    name: str  # for logs and manifests
    streams: Mapping[str, Codec]  # codec of every stream that any scene has
    stream_sets: tuple[tuple[str, ...], ...]  # the distinct stream tuples of the scenes, sorted
    classes: tuple[str, ...] = ()  # the distinct class names of the scenes, sorted, without ""
    skipped: tuple[Failure, ...] = ()  # data that listing found and that is not used

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: Any = from_config_dict(self.config_class, parameters, self.kind)
        for key in self.required:
            if not getattr(self.config, key):
                raise UserError(f"{self.kind}.{key} is missing")
        streams = getattr(self.config, "streams", ())
        if isinstance(streams, Mapping) and streams and "rgb" not in streams:
            raise UserError(f"{self.kind}.streams: {sorted(streams)} lack rgb; name every stream to read")
        self._columns = dict(streams) if isinstance(streams, Mapping) else dict.fromkeys(streams, "")
        self._preprocess, self._skipped = preprocess, list[Failure]()
        self._origin = getattr(self.config, self.required[0]) if self.required else self.kind  # for errors
        self._files: list[str] = []  # in `_root`; their sizes and tails are part of the identity
        self._stream_names: tuple[str, ...] = STREAMS  # in the order of a scene
        self._reset()
        self._scenes: list[tuple[SceneInfo, Location]] = list(self._list_scenes())
        used = {stream for info, _ in self._scenes for stream in info.streams}
        for stream in [stream for stream in self._columns if self._scenes and stream not in used]:
            column = self._columns[stream]
            self._skip(stream, f"no scene has this stream{f': nothing in {column!r}' if column else ''}")
        self.skipped = tuple(self._skipped)
        if not len(self):
            reasons = "".join(f" ({failure.key}: {failure.reason})" for failure in self.skipped[:1])
            raise UserError(f"{self._origin}: found no usable {self.scene_noun}{reasons}")
        if self._scenes:
            self.stream_sets = tuple(sorted({info.streams for info, _ in self._scenes}))
            self.classes = tuple(sorted({info.class_name for info, _ in self._scenes} - {""}))

    def __len__(self) -> int:
        return len(self._scenes)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self.unpicklable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def info(self, index: int) -> SceneInfo:
        """Returns the metadata of a scene; frames may turn out unreadable. Raises IndexError outside of [0, len)."""
        return self._scene(index)[0]

    def describe(self) -> dict[str, Any]:
        """Returns the kind and parameters as JSON: equal for equal sources, wherever their files are."""
        fields = {"kind": self.kind, "num_scenes": len(self)}
        files = [(file, self._root / file) for file in self._files]
        return fields | ({"listing": listing.hash_files(files, tail_bytes=65536)} if files else {})

    def _list_scenes(self) -> Iterable[tuple[SceneInfo, Location]]:
        """Lists all scenes; by default none, for a source that overrides `__len__` and `info`."""
        return ()

    def _list_files(
        self, list_file: Callable[[str], Iterable[tuple[SceneInfo, Location]]]
    ) -> Iterator[tuple[SceneInfo, Location]]:
        """Lists the scenes of each file; a file whose listing raises UnreadableError or `read_errors` is skipped."""
        root, files = listing.find_files(self.config.path, listing.SUFFIXES[self.kind], self._skip)
        self._set_root(root)
        for file in files:
            try:
                scenes = list(list_file(file))
            except UnreadableError as error:
                self._skip(file, str(error))
            except self.read_errors as error:
                self._skip(file, f"can't be read: {listing.relative_to(root, error)}")
            else:
                self._files.append(file)
                yield from scenes

    def _reset(self) -> None:
        """Sets the attributes that can't be pickled, such as open files and locks."""

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")

    def _scene(self, index: int) -> tuple[SceneInfo, Location]:
        self._check_index(index)
        return self._scenes[index]

    def _skip(self, key: str, reason: str) -> None:
        self._skipped.append(Failure(key, reason))

    def _set_root(self, root: pathlib.Path) -> None:
        """Sets the folder that the source's paths are relative to."""
        self._root, self.name = root, root.resolve().name
        names = (*STREAMS, *declared_streams(root), *sorted(self._columns))
        self._stream_names = tuple(dict.fromkeys(names))

    def _codecs_json(self) -> dict[str, Any]:
        return {stream: codec.to_json() for stream, codec in self.streams.items()}


class ImageSource(SceneSource[Location]):
    """Base class of the image sources. `load` is a pure function of source and index."""

    @abc.abstractmethod
    def load(self, index: int) -> SceneImages:
        """Decodes a scene; frames with an unreadable stream become failures. Raises IndexError outside of [0, len)."""

    def _scene_images(self, info: SceneInfo, frames: Sequence[np.ndarray], reasons: Iterable[str] = ()) -> SceneImages:
        """Stacks the readable frames [S, R, R, 3] of a scene; `reasons` are those of its failures."""
        R = self._preprocess.resolution
        images = np.stack(frames) if frames else np.empty((0, len(info.streams), R, R, 3), np.uint8)
        failures = tuple(Failure(info.key, reason) for reason in reasons)
        return SceneImages(dataclasses.replace(info, num_frames=len(frames)), images, failures)


class ImageFileSource(ImageSource[Location]):
    """Base class of sources whose frames are image files, one per stream. A subclass implements `_open_scene`."""

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        super().__init__(preprocess, **parameters)
        used = {stream for streams in self.stream_sets for stream in streams}
        self._readers = self._make_readers([stream for stream in self._stream_names if stream in used])
        self.streams = {stream: reader.codec for stream, reader in self._readers.items()}

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`. A failure's key is the scene's; its reason begins with the file."""
        info, scene_files = self._open_scene(index)
        frames, reasons = [], []
        for files in scene_files:
            try:
                files = {stream: files[stream] for stream in info.streams}
                frames.append(read_frame(self._readers, files, self._preprocess))
            except UnreadableError as error:
                reasons.append(str(error))
        return self._scene_images(info, frames, reasons)

    @abc.abstractmethod
    def _open_scene(self, index: int) -> tuple[SceneInfo, Iterable[Mapping[str, ImageFile]]]:
        """Returns a scene's metadata and, for each frame, the image file of each stream."""

    def _make_readers(self, streams: Sequence[str]) -> dict[str, Reader]:
        return make_readers(self._root, {stream: self._stream_files(stream) for stream in streams})

    def _stream_files(self, stream: str) -> Iterator[ImageFile]:
        for index in range(len(self)):
            yield from (files[stream] for files in self._open_scene(index)[1] if stream in files)


class CodeSource(SceneSource[Location]):
    """Base class of sources of codes, which need no tokenizer."""

    num_codes: int  # codebook size
    grid: tuple[int, ...]  # rows and columns of an image's codes

    @abc.abstractmethod
    def load_codes(self, index: int) -> SceneCodes:
        """Reads the codes of a scene. Raises IndexError outside of [0, len)."""
