"""Scenes from datasets that tensorflow-datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import tensorflow_datasets

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import check_index
from lvm.data.images.sources.readers import (
    STREAMS,
    FrameReader,
    Reader,
    SegmentationReader,
    make_readers,
    palette_colors,
)
from lvm.data.streams.codecs import Codec, Palette

features = tensorflow_datasets.features
LabeledImage = features.LabeledImage
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TfdsConfig:
    """The parameters of a prepared dataset.

    Attributes:
      name: such as "oxford_iiit_pet", or the folder of a prepared version, such as ".../oxford_iiit_pet/4.0.0".
      split: such as "train" or "train[:10%]".
      data_dir: where tensorflow-datasets keeps what it has prepared; its own default if empty.
      streams: the feature of each stream, "video/frames" for one inside another. By default a feature named as a
        stream is that; the only other picture or video is rgb, and the only labelled picture segmentation.
      class_name: a ClassLabel feature; by default `label`, if there is one.
      group: a feature that names what must stay on one side of the split; by default each scene is its own.
    """

    kind: ClassVar[str] = "tfds"
    name: str = ""
    split: str = "train"
    data_dir: str = ""
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_name: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError(
                "name: is missing; expected that of a dataset, or the folder of a prepared version"
            )
        if self.streams and "rgb" not in self.streams:
            raise UserError(
                f"streams: {sorted(self.streams)} lack rgb; name the feature of every stream that is wanted"
            )


class TfdsSource:
    """An `ImageSource` of a dataset that was prepared with `file_format="array_record"`, by `as_data_source`.

    Example 12 of split train of the dataset pets is the scene "pets/train/12": of one frame for features of pictures,
    of all frames for videos and sequences of pictures. Pictures are decoded by this project, as all others are; the
    classes of a LabeledImage are its names.

    Args:
      preprocess: how pictures become images.
      **parameters: the fields of `TfdsConfig`.

    Raises:
      UserError: the dataset isn't prepared, has no such split or feature, or needs a package that is missing.
    """

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: TfdsConfig = from_config_dict(TfdsConfig, parameters, "tfds")
        builder = self._ask(self._builder)
        found = dict(sorted(_pictures(builder.info.features), key=lambda item: item[0]))
        self._columns = dict(self.config.streams) or self._guess(found)
        if unknown := [path for path in self._columns.values() if path not in found]:
            raise UserError(
                f"{self.config.name}: no picture {unknown[0]!r}; it has {', '.join(found) or 'none'}"
            )
        decoders: dict[str, Any] = {}
        for path in found:
            *parents, last = path.split("/")
            functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, decoders)[last] = (
                _Encoded()
            )
        self._examples = self._ask(lambda: builder.as_data_source(split=self.config.split, decoders=decoders))
        if not len(self._examples):
            raise UserError(f"{self.config.name}: split {self.config.split!r} is empty")
        self._label = self.config.class_name or ("label" if _is_label(builder.info.features, "label") else "")
        if self._label and not _is_label(builder.info.features, self._label):
            raise UserError(f"{self.config.name}: class_name: {self._label!r} is no ClassLabel of it")
        self._names = builder.info.features[self._label].names if self._label else []
        if self.config.group and self.config.group not in builder.info.features:
            raise UserError(f"{self.config.name}: group: it has no feature {self.config.group!r}")
        self.name, self._version = builder.name, str(builder.version)
        self.classes: tuple[str, ...] = tuple(sorted(self._names))
        self.skipped: tuple[Failure, ...] = ()
        self.stream_sets: tuple[tuple[str, ...], ...] = (tuple(self._columns),)
        self._frames = FrameReader(self._readers(found, pathlib.Path(builder.data_dir)), preprocess)
        self.streams: Mapping[str, Codec] = self._frames.streams

    def __len__(self) -> int:
        return len(self._examples)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`. Reads the example, for its class and its frames."""
        check_index(index, len(self))
        return self._info(index, self._examples[index])

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        check_index(index, len(self))
        example = self._examples[index]
        info = self._info(index, example)
        files = {stream: _files(example, path) for stream, path in self._columns.items()}
        frames = (
            {
                stream: ImageFile(f"{stream} {frame}", functools.partial(_at, files[stream], frame))
                for stream in files
            }
            for frame in range(info.num_frames)
        )
        return self._frames.load(info, frames)

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {
            "kind": self.config.kind,
            "name": self.name,
            "version": self._version,
            "split": self.config.split,
            "features": self._columns,
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
            "num_scenes": len(self),
        }

    def _builder(self) -> Any:
        if pathlib.Path(self.config.name).is_dir():
            return tensorflow_datasets.builder_from_directory(self.config.name)
        return tensorflow_datasets.builder(self.config.name, data_dir=self.config.data_dir or None)

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer of tensorflow-datasets, or its complaint in a line."""
        try:
            return question()
        except ImportError as error:
            raise UserError(
                f"{self.config.name}: tensorflow-datasets needs the package {error.name!r} for this dataset; install "
                "it, or prepare the dataset elsewhere with file_format='array_record' and features that don't need it"
            ) from error
        except Exception as error:  # its many libraries raise what they like
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.config.name}: tensorflow-datasets: {type(error).__name__}: {reason}; expected a dataset that "
                "was prepared with file_format='array_record', and a split of it"
            ) from error

    def _guess(self, found: Mapping[str, Any]) -> dict[str, str]:
        named = {stream: stream for stream in STREAMS if stream in found}
        others = [path for path in found if path not in named]
        labelled = [path for path in others if isinstance(found[path], LabeledImage)]
        plain = [path for path in others if path not in labelled]
        if "rgb" not in named and len(plain) != 1:
            raise UserError(
                f"{self.config.name}: its pictures are {', '.join(found) or 'none'}; name that of each stream, such "
                'as streams={"rgb": "image"}'
            )
        guess = named if "rgb" in named else {"rgb": plain[0], **named}
        if len(labelled) == 1 and "segmentation" not in guess:
            guess["segmentation"] = labelled[0]
        return {stream: guess[stream] for stream in STREAMS if stream in guess}

    def _readers(self, found: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Reader]:
        named = {
            s: tuple(f.names)
            for s, path in self._columns.items()
            if isinstance(f := found[path], LabeledImage)
        }
        readers = make_readers(folder, {s: () if s in named else self._blobs(s) for s in self._columns})
        for stream, names in named.items():
            codec = Palette(names, background=0 if names[0].lower() == "background" else None)
            readers[stream] = SegmentationReader(codec, palette_colors(codec), "the palette of stream codecs")
        return readers

    def _blobs(self, stream: str) -> Iterator[ImageFile]:
        path = self._columns[stream]
        files = (file for index in range(len(self)) for file in _files(self._examples[index], path))
        return (ImageFile(path, functools.partial(bytes, file)) for file in files)

    def _info(self, index: int, example: Mapping[str, Any]) -> SceneInfo:
        key = f"{self.name}/{self.config.split}/{index}"
        group = _text(example[self.config.group]) if self.config.group else key
        number = int(example[self._label]) if self._label else -1
        class_name = self._names[number] if number >= 0 else ""
        frames = len(_files(example, next(iter(self._columns.values()))))
        return SceneInfo(key, group, class_name, frames, tuple(self._columns))


class _Encoded(tensorflow_datasets.decode.Decoder):
    """Leaves pictures as the bytes of their files."""

    def decode_example(self, serialized_example: Any) -> Any:
        return serialized_example

    def decode_batch_example_np(self, serialized_example: Any) -> Any:
        """Those of a sequence of pictures."""
        return serialized_example


def _pictures(feature: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The features that are pictures, or sequences of them, by path."""
    if isinstance(feature, features.Image):
        yield path, feature
    elif isinstance(feature, features.Sequence):
        yield from _pictures(feature.feature, path)
    elif isinstance(feature, features.FeaturesDict):
        for name, part in feature.items():
            yield from _pictures(part, f"{path}/{name}" if path else name)


def _is_label(all_features: Any, name: str) -> bool:
    return name in all_features and isinstance(all_features[name], features.ClassLabel)


def _files(example: Mapping[str, Any], path: str) -> list[bytes]:
    """The picture files of a feature: one, or those of a sequence."""
    value: Any = example
    for part in path.split("/"):
        value = value[part]
    return [value] if isinstance(value, bytes) else list(value)


def _at(files: list[bytes], frame: int) -> bytes:
    if frame >= len(files):
        raise UnreadableError(f"there are {len(files)} frames of it")
    return files[frame]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
