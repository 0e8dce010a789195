"""Image source of datasets prepared by tensorflow-datasets, read without TensorFlow."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets

from lvm.common.errors import UserError
from lvm.data.images.sources.base import ImageFileSource
from lvm.data.images.sources.folders import Folder
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.readers import STREAMS, Reader, SegmentationReader, match_columns
from lvm.data.images.sources.scene import SceneInfo
from lvm.data.streams.codecs import Palette

features = tensorflow_datasets.features
LabeledImage = features.LabeledImage


@dataclasses.dataclass(frozen=True)
class TfdsConfig:
    """Parameters of a prepared dataset.

    Attributes:
      name: such as "oxford_iiit_pet", or the folder of a prepared version, such as ".../oxford_iiit_pet/4.0.0".
      split: such as "train" or "train[:10%]".
      data_dir: the folder of prepared datasets; empty for the default of tensorflow-datasets.
      streams: feature of each stream, "video/frames" for a nested one; scenes have this order. By default features
        named as streams are those, the only other image or video is rgb, and the only LabeledImage is segmentation.
      class_name: a ClassLabel feature; by default `label`, if there is one.
      group: feature of what a split must not separate; by default each scene is its own group.
    """

    name: str = ""
    split: str = "train"
    data_dir: str = ""
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_name: str = ""
    group: str = ""


class TfdsSource(ImageFileSource[None]):
    """An `ImageSource` of a dataset that was prepared with `file_format="array_record"`, by `as_data_source`.

    Example 12 of split train of the dataset pets is the scene "pets/train/12": one frame for image features, all
    frames for videos and sequences of images. Images are decoded by this project, as for every source. A LabeledImage
    gives the class names of its segmentation.

    Raises:
      UserError: the dataset isn't prepared, has no such split or feature, or needs a package that is missing.
    """

    kind = "tfds"
    config_class = TfdsConfig
    required = ("name",)
    scene_noun = "example"

    def __len__(self) -> int:
        return len(self._examples)

    def info(self, index: int) -> SceneInfo:
        """See `SceneSource.info`. Reads the example for its class and number of frames."""
        return self._open_scene(index)[0]

    def describe(self) -> dict[str, Any]:
        fields = {"name": self.name, "version": self._version, "split": self.config.split}
        return super().describe() | fields | {"features": self._columns}

    def _list_scenes(self) -> Iterator[tuple[SceneInfo, None]]:
        config, build = self.config, tensorflow_datasets.builder_from_directory
        if not pathlib.Path(config.name).is_dir():
            build = functools.partial(tensorflow_datasets.builder, data_dir=config.data_dir or None)
        builder = self._query(lambda: build(config.name))
        self._folder, self._version = Folder(pathlib.Path(builder.data_dir)), str(builder.version)
        self._root, self.name = self._folder.path, builder.name
        self._images = dict(sorted(_image_features(builder.info.features), key=lambda item: item[0]))
        self._columns = self._columns or self._match_features()
        for path in self._columns.values():
            if path not in self._images:
                names = ", ".join(self._images) or "none"
                raise UserError(f"{config.name}: no image feature {path!r}; it has {names}")
        decoders: dict[str, Any] = {}
        for path in self._images:
            *parents, name = path.split("/")
            group = functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, decoders)
            group[name] = _NoDecoder()
        self._examples = self._query(lambda: builder.as_data_source(split=config.split, decoders=decoders))
        self._label = config.class_name or ("label" if _is_label(builder.info.features, "label") else "")
        if self._label and not _is_label(builder.info.features, self._label):
            raise UserError(f"{config.name}: class_name: {self._label!r} is no ClassLabel of it")
        self._names = builder.info.features[self._label].names if self._label else []
        if config.group and config.group not in builder.info.features:
            raise UserError(f"{config.name}: group: it has no feature {config.group!r}")
        self.classes = tuple(sorted(self._names))
        self._stream_names = tuple(self._columns)
        self.stream_sets = (self._stream_names,)
        yield from ()

    def _query(self, function: Callable[[], Any]) -> Any:
        """Calls tensorflow-datasets; its errors become a UserError of one line."""
        try:
            return function()
        except ImportError as error:
            raise UserError(
                f"{self.config.name}: tensorflow-datasets needs the package {error.name!r} for this dataset; install "
                "it, or prepare the dataset elsewhere with file_format='array_record' and features that don't need it"
            ) from error
        except Exception as error:  # its many libraries raise errors of any type
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.config.name}: tensorflow-datasets: {type(error).__name__}: {reason}; expected a dataset that "
                "was prepared with file_format='array_record', and a split of it"
            ) from error

    def _match_features(self) -> dict[str, str]:
        labeled = [p for p, f in self._images.items() if isinstance(f, LabeledImage) and p not in STREAMS]
        try:
            columns = match_columns([path for path in self._images if path not in labeled], STREAMS)
        except UserError as error:
            raise UserError(f"{self.config.name}: {error}") from error
        if len(labeled) == 1:
            columns.setdefault("segmentation", labeled[0])
        return {stream: columns[stream] for stream in STREAMS if stream in columns}

    def _make_readers(self, streams: Sequence[str]) -> dict[str, Reader]:
        images = {stream: self._images[self._columns[stream]] for stream in streams}
        readers = super()._make_readers([s for s in streams if not isinstance(images[s], LabeledImage)])
        for stream in set(streams) - set(readers):
            classes = tuple(images[stream].names)
            background = 0 if classes[0].lower() == "background" else None
            readers[stream] = SegmentationReader(Palette(classes, background=background))
        return {stream: readers[stream] for stream in streams}

    def _open_scene(self, index: int) -> tuple[SceneInfo, Iterable[dict[str, ImageFile]]]:
        self._check_index(index)
        example = self._examples[index]
        key = f"{self.name}/{self.config.split}/{index}"
        group = example[self.config.group] if self.config.group else key
        class_id = int(example[self._label]) if self._label else -1
        class_name = self._names[class_id] if class_id >= 0 else ""
        images = {stream: _images(example, path) for stream, path in self._columns.items()}
        num_frames = len(images["rgb"])
        longest = max(images, key=lambda stream: len(images[stream]))
        frames = [
            {s: ImageFile(f"{s} {t}", functools.partial(_at, images[s], s, t)) for s in images}
            for t in range(num_frames)
        ]
        frames += [  # listed as failures, like frames that another stream lacks
            {s: ImageFile(f"{longest} {t}", functools.partial(_at, images["rgb"], "rgb", t)) for s in images}
            for t in range(num_frames, len(images[longest]))
        ]
        group = group.decode() if isinstance(group, bytes) else str(group)
        return SceneInfo(key, group, class_name, num_frames, tuple(self._columns)), frames


class _NoDecoder(tensorflow_datasets.decode.Decoder):
    """Leaves images as the bytes of their files."""

    def decode_example(self, serialized_example: Any) -> Any:
        return serialized_example

    decode_batch_example_np = decode_example  # for sequences of images


def _image_features(feature: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the features that are images, or sequences of them, by path."""
    if isinstance(feature, features.Image):
        yield path, feature
    elif isinstance(feature, features.Sequence):
        yield from _image_features(feature.feature, path)
    elif isinstance(feature, features.FeaturesDict):
        for name, child in feature.items():
            yield from _image_features(child, f"{path}/{name}" if path else name)


def _is_label(all_features: Any, name: str) -> bool:
    return name in all_features and isinstance(all_features[name], features.ClassLabel)


def _images(example: Mapping[str, Any], path: str) -> list[bytes]:
    """Returns the image files of a feature: one, or those of a sequence."""
    value: Any = functools.reduce(lambda tree, name: tree[name], path.split("/"), example)
    return [value] if isinstance(value, bytes) else list(value)


def _at(images: list[bytes], stream: str, frame: int) -> bytes:
    if frame >= len(images):
        raise UnreadableError(f"{stream} has {len(images)} frames")
    return images[frame]
