"""Base classes of what lists and loads scenes: image sources and code sources."""

import abc
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from jaxtyping import UInt8

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import listing
from lvm.data.images.sources.division import PartSpec, divide_files, split_range
from lvm.data.images.sources.finding import find_files, hash_files
from lvm.data.images.sources.folders import Folder
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.readers import (
    STREAMS,
    Reader,
    declared_streams,
    hash_settings,
    make_readers,
    read_frame,
)
from lvm.data.images.sources.scene import Failure, SceneCodes, SceneImages, SceneInfo
from lvm.data.streams.codecs import Codec

_TAIL_BYTES = 65536  # of a local file, for its identity: a tar ends in at least 10 KB of padding

Location = TypeVar("Location")  # where a scene's data is, as its source needs it


@dataclasses.dataclass(frozen=True)
class PathConfig:
    """Parameters of a source of files. `path` is a file, a folder, or a pattern such as "data/train-*.parquet"."""

    path: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source (`PartSpec`), listed.

    Attributes:
      scenes: what the source's `info` and `load` take instead of an index, in other processes, too.
      skipped: data that listing found and that is not used.
      release: to be called when the scenes are loaded.
    """

    scenes: Sequence[Any]
    skipped: tuple[Failure, ...] = ()
    release: Callable[[], None] = lambda: None


class SceneSource(abc.ABC, Generic[Location]):
    """Base class of all sources: scenes by index, listed without decoding.

    A kind of files (`listing.SUFFIXES`) overrides `_list_file`. Its files are found at once; they are listed when their
    part is asked for, or all when a scene is asked for by index. Other kinds override `_list_scenes` and are listed at
    once, or override `__len__`, `info` and `load`.

    A source is pickled for other processes without its list of scenes, and without its `unpicklable` attributes, which
    `_reset` sets.

    Args:
      preprocess: converts decoded images to the model's size.
      **parameters: the fields of `config_class`.

    Raises:
      UserError: an unknown parameter, an impossible value, no file, or, when it is listed, no usable scene.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type] = PathConfig  # a frozen dataclass
    required: ClassVar[tuple[str, ...]] = ("path",)  # parameters that must not be empty
    scene_noun: ClassVar[str] = "scene"  # for "found no usable …"
    read_errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)  # skip a file that can't be listed
    unpicklable: ClassVar[tuple[str, ...]] = ()

    name: str  # for logs and manifests
    streams: Mapping[str, Codec]  # codec of every stream that any scene has
    _files: Sequence[str] = ()  # in `_folder`, of a kind of files
    _is_part: bool = False  # of a copy that lists a part, which happens once
    _skipped: list[Failure]

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: Any = from_config_dict(self.config_class, parameters, self.kind)
        for key in self.required:
            if not getattr(self.config, key):
                raise UserError(f"{self.kind}.{key} is missing")
        streams = getattr(self.config, "streams", ())
        if isinstance(streams, Mapping) and streams and "rgb" not in streams:
            raise UserError(f"{self.kind}.streams: {sorted(streams)} lack rgb; name every stream to read")
        self._columns = dict(streams) if isinstance(streams, Mapping) else dict.fromkeys(streams, "")
        self._preprocess, self._skipped = preprocess, []
        self._origin = getattr(self.config, self.required[0]) if self.required else self.kind  # for errors
        self._stream_names: tuple[str, ...] = STREAMS  # in the order of a scene
        self._reset()
        if self.kind in listing.SUFFIXES:
            folder, self._files = find_files(self.config.path, listing.SUFFIXES[self.kind], self._skip)
            self._set_folder(folder)
        else:
            self._scenes = self._list_all()
            self._check_usable(len(self))
        self._num_found = len(self._skipped)

    @functools.cached_property
    def stream_sets(self) -> tuple[tuple[str, ...], ...]:
        """The distinct stream tuples of the scenes, sorted."""
        return tuple(sorted({info.streams for info, _ in self._scenes}))

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The distinct class names of the scenes, sorted, without ""."""
        return tuple(sorted({info.class_name for info, _ in self._scenes} - {""}))

    @functools.cached_property
    def skipped(self) -> tuple[Failure, ...]:
        """Data that listing found and that is not used."""
        len(self)
        return tuple(self._skipped)

    @property
    def is_listed(self) -> bool:
        """True if its scenes are listed at once, not by part."""
        return not self._files

    @property
    def skipped_files(self) -> tuple[Failure, ...]:
        """Those of `skipped` that are known without listing any file."""
        return tuple(self._skipped[: self._num_found]) if self._files else self.skipped

    @functools.cached_property
    def _scenes(self) -> list[tuple[SceneInfo, Location]]:
        self._skipped = [*self._skipped[: self._num_found]]
        return self._list_all()

    def _list_all(self) -> list[tuple[SceneInfo, Location]]:
        scenes = list(self._list_scenes())
        used = {stream for info, _ in scenes for stream in info.streams}
        for stream in [stream for stream in self._columns if scenes and stream not in used]:
            column = self._columns[stream]
            self._skip(stream, f"no scene has this stream{f': nothing in {column!r}' if column else ''}")
        return scenes

    def __len__(self) -> int:
        self._check_usable(len(self._scenes))
        return len(self._scenes)

    def __getstate__(self) -> dict[str, Any]:
        dropped = {"_scenes", "skipped", "_skipped", *self.unpicklable}
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._skipped, self._num_found = [], 0
        self._reset()

    def for_workers(self) -> Self:
        """Returns a copy that loads the scenes of parts alone: its size doesn't grow with the number of files."""
        source = copy.copy(self)
        source._files = ()
        return source

    def info(self, index: int) -> SceneInfo:
        """Returns the metadata of a scene; frames may turn out unreadable.

        Args:
          index: of the scene, or its element of a `Part`'s `scenes`.

        Raises:
          IndexError: outside of [0, len).
        """
        return self._scene(index)[0]

    def codecs(self, streams: Iterable[str]) -> dict[str, Codec]:
        """Returns the codecs of some streams, which a part needn't list the others for."""
        return {stream: self.streams[stream] for stream in streams}

    def describe(self) -> dict[str, Any]:
        """Returns the kind and parameters as JSON: equal for equal sources, wherever their files are."""
        if not self._files:
            return {"kind": self.kind, "num_scenes": len(self)}
        listed = hash_files(self._folder, ((file, file) for file in self._files), _TAIL_BYTES)
        return {"kind": self.kind, "num_files": len(self._files), "listing": listed}

    def plan(self, shard: int, num_shards: int) -> list[PartSpec]:
        """Returns the parts whose scenes a shard has: a function of the number of its files, or else of scenes."""
        if self._files:
            return divide_files(len(self._files), shard, num_shards)
        return [PartSpec(*split_range(len(self), shard, num_shards))]

    def part(self, spec: PartSpec) -> Part:
        """Lists a part. Its files, if they are remote, stay on a local disk until its `release`.

        Raises UnavailableError if a storage doesn't answer.
        """
        if not self._files:
            listed = vars(self).get("_scenes")
            return Part(listed[spec.start : spec.stop] if listed else range(spec.start, spec.stop))
        files, lister = self._files[spec.start : spec.stop], self._copy_for_part()
        held = [file for file in files if lister._hold(file, spec.piece)]
        scenes = [scene for file in held for scene in lister._list_piece(file, spec.piece, spec.pieces)]
        return Part(scenes, tuple(lister._skipped), functools.partial(self._release, held))

    def _copy_for_part(self) -> Self:
        """Returns a copy that lists some files, and has what it skips to itself."""
        lister = copy.copy(self)
        lister._is_part = True
        return lister

    def _hold(self, file: str, piece: int) -> bool:
        try:
            self._folder.hold(file)
        except (OSError, UnreadableError) as error:
            if not piece:
                self._skip(file, f"can't be read: {listing.failure_reason(self._root, error)}")
            return False
        return True

    def _release(self, files: Sequence[str]) -> None:
        for file in files:
            self._folder.release(file)

    def _list_scenes(self) -> Iterable[tuple[SceneInfo, Location]]:
        """Lists all scenes; by default those of each file."""
        return (scene for file in self._files for scene in self._list_piece(file))

    def _list_file(self, file: str) -> Iterable[tuple[SceneInfo, Location]]:
        """Lists the scenes of a file; if it raises UnreadableError or `read_errors`, the file is skipped."""
        raise TypeError(f"{type(self).__name__} lists no files")

    def _list_range(self, file: str, piece: int, pieces: int) -> Iterable[tuple[SceneInfo, Location]]:
        """Lists one of `pieces` ranges of a file's scenes; the first one has what is skipped."""
        num_skipped = len(self._skipped)
        scenes = list(self._list_file(file))
        if piece:
            del self._skipped[num_skipped:]
        return scenes[slice(*split_range(len(scenes), piece, pieces))]

    def _list_piece(self, file: str, piece: int = 0, pieces: int = 1) -> list[tuple[SceneInfo, Location]]:
        """`_list_range`; a file that can't be listed is skipped."""
        try:
            return list(self._list_range(file, piece, pieces))
        except UnreadableError as error:
            reason = str(error)
        except self.read_errors as error:
            reason = f"can't be read: {listing.failure_reason(self._root, error)}"
        if not piece:
            self._skip(file, reason)
        return []

    def _reset(self) -> None:
        """Sets the attributes that can't be pickled, such as open files and locks."""

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")

    def _check_usable(self, count: int) -> None:
        if not count:
            reasons = "".join(f" ({failure.key}: {failure.reason})" for failure in self._skipped[:1])
            raise UserError(f"{self._origin}: found no usable {self.scene_noun}{reasons}")

    def _scene(self, index: int | tuple[SceneInfo, Location]) -> tuple[SceneInfo, Location]:
        if isinstance(index, tuple):
            return index
        self._check_index(index)
        return self._scenes[index]

    def _skip(self, key: str, reason: str) -> None:
        self._skipped.append(Failure(key, reason))

    def _set_folder(self, folder: Folder) -> None:
        """Sets the folder that the source's files are relative to."""
        self._folder, self._root, self.name = folder, folder.path, folder.name
        with folder.named_errors():
            names = (*STREAMS, *declared_streams(self._root), *sorted(self._columns))
        self._stream_names = tuple(dict.fromkeys(names))


class ImageSource(SceneSource[Location]):
    """Base class of the image sources. `load` is a pure function of source and index."""

    @abc.abstractmethod
    def load(self, index: int) -> SceneImages:
        """Decodes a scene; frames with an unreadable stream become failures. Index and errors as for `info`."""

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        """Decodes one stream of one frame, with another preprocess than the source's.

        Raises:
          UnreadableError: it can't be read, or, where a scene is decoded at once, any of its frames can't.
        """
        source = copy.copy(self)
        source._preprocess = preprocess
        scene = source.load(index)
        if scene.failures:
            raise UnreadableError(scene.failures[0].reason)
        return scene.images[frame, scene.info.streams.index(stream)]

    def _scene_images(self, info: SceneInfo, frames: Sequence[np.ndarray], reasons: Iterable[str] = ()) -> SceneImages:
        """Stacks the readable frames [S, R, R, 3] of a scene; `reasons` are those of its failures."""
        R = self._preprocess.resolution
        images = np.stack(frames) if frames else np.empty((0, len(info.streams), R, R, 3), np.uint8)
        failures = tuple(Failure(info.key, reason) for reason in reasons)
        return SceneImages(dataclasses.replace(info, num_frames=len(frames)), images, failures)


class ImageFileSource(ImageSource[Location]):
    """Base class of sources whose frames are image files, one per stream. A subclass implements `_open_scene`."""

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self._readers: dict[str, Reader] = {}  # of the streams that were met
        super().__init__(preprocess, **parameters)
        if self.is_listed:
            self.streams  # noqa: B018 (raises errors of the settings files)

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`. A failure's key is the scene's; its reason begins with the file."""
        info, scene_files = self._open_scene(index)
        readers = self._readers_of(info.streams)
        frames, reasons = [], []
        for files in scene_files:
            try:
                files = {stream: files[stream] for stream in info.streams}
                frames.append(read_frame(readers, files, self._preprocess))
            except UnreadableError as error:
                reasons.append(str(error))
        return self._scene_images(info, frames, reasons)

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        file = next(itertools.islice(self._open_scene(index)[1], frame, None))[stream]
        try:
            return self._readers_of((stream,))[stream].read_file(file, preprocess)
        except (UnreadableError, UserError) as error:
            raise UnreadableError(f"{file.name}: {error}") from error

    @functools.cached_property
    def streams(self) -> Mapping[str, Codec]:  # type: ignore[override]
        """See `SceneSource.streams`."""
        return self.codecs(stream for streams in self.stream_sets for stream in streams)

    def codecs(self, streams: Iterable[str]) -> dict[str, Codec]:
        return {stream: reader.codec for stream, reader in self._readers_of(streams).items()}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"settings": hash_settings(self._root)}

    @abc.abstractmethod
    def _open_scene(self, index: Any) -> tuple[SceneInfo, Iterable[Mapping[str, ImageFile]]]:
        """Returns a scene's metadata and, for each frame, the image file of each stream."""

    def _readers_of(self, streams: Iterable[str]) -> dict[str, Reader]:
        """Returns the readers of some streams, in the order of a scene."""
        used = set(streams)
        names = [stream for stream in self._stream_names if stream in used]
        if missing := [stream for stream in names if stream not in self._readers]:
            self._readers |= self._make_readers(missing)
        return {stream: self._readers[stream] for stream in names}

    def _make_readers(self, streams: Sequence[str]) -> dict[str, Reader]:
        with self._folder.named_errors():
            return make_readers(self._root, {stream: self._stream_files(stream) for stream in streams})

    def _stream_files(self, stream: str) -> Iterator[ImageFile]:
        """Yields the files of a stream, from the first file of the source on whatever part asks."""
        is_listed = self.is_listed or "_scenes" in vars(self)
        scenes = range(len(self)) if is_listed else self._copy_for_part()._list_scenes()
        for scene in scenes:
            yield from (files[stream] for files in self._open_scene(scene)[1] if stream in files)


class CodeSource(SceneSource[Location]):
    """Base class of sources of codes, which need no tokenizer."""

    num_codes: int  # codebook size
    grid: tuple[int, ...]  # rows and columns of an image's codes

    @abc.abstractmethod
    def load_codes(self, index: int) -> SceneCodes:
        """Reads the codes of a scene. Raises IndexError outside of [0, len)."""
