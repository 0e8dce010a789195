"""Image source that adds streams computed from the rgb of another source."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource, Part
from lvm.data.images.sources.division import PartSpec
from lvm.data.images.sources.scene import Failure, SceneImages, SceneInfo
from lvm.data.streams.codecs import Codec
from lvm.data.streams.derived import DERIVED, derive


class DerivedStreams(ImageSource[None]):
    """An `ImageSource` whose scenes have derived streams after those of another source.

    Raises:
      UserError: a name in `derived` that is unknown, repeated or a stream of the source, or scenes without rgb.
    """

    def __init__(self, source: ImageSource, derived: Sequence[str], seed: int = 0) -> None:
        for i, stream in enumerate(derived):
            if stream not in DERIVED:
                raise UserError(f"derived: {stream!r} is unknown; expected some of {', '.join(DERIVED)}")
            if stream in derived[:i]:
                raise UserError(f"derived: {stream!r} is named twice")
        self._source, self._derived, self._seed, self.name = source, tuple(derived), seed, source.name
        if source.is_listed:
            self.stream_sets  # noqa: B018 (raises errors of the streams)

    @functools.cached_property
    def streams(self) -> Mapping[str, Codec]:  # type: ignore[override]
        """See `SceneSource.streams`."""
        return self.codecs((*self._source.streams, *self._derived))

    @functools.cached_property
    def stream_sets(self) -> tuple[tuple[str, ...], ...]:
        """See `SceneSource.stream_sets`."""
        return tuple(sorted(map(self._add_names, self._source.stream_sets)))

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """See `SceneSource.classes`."""
        return self._source.classes

    @functools.cached_property
    def skipped(self) -> tuple[Failure, ...]:
        """See `SceneSource.skipped`."""
        return self._source.skipped

    @property
    def skipped_files(self) -> tuple[Failure, ...]:
        return self._source.skipped_files

    @property
    def is_listed(self) -> bool:
        return self._source.is_listed

    def codecs(self, streams: Iterable[str]) -> dict[str, Codec]:
        names = tuple(streams)
        codecs = self._source.codecs(stream for stream in names if stream not in self._derived)
        return codecs | {stream: DERIVED[stream][1] for stream in self._derived if stream in names}

    def plan(self, shard: int, num_shards: int) -> list[PartSpec]:
        return self._source.plan(shard, num_shards)

    def part(self, spec: PartSpec) -> Part:
        return self._source.part(spec)

    def for_workers(self) -> "DerivedStreams":
        return DerivedStreams(self._source.for_workers(), self._derived, self._seed)

    def __len__(self) -> int:
        return len(self._source)

    def info(self, index: int) -> SceneInfo:
        return self._add_streams(self._source.info(index))

    def load(self, index: int) -> SceneImages:
        scene = self._source.load(index)
        rgb = scene.images[:, scene.info.streams.index("rgb")]  # [T, R, R, 3]
        derived = [derive(stream, rgb, scene.info.key, self._seed) for stream in self._derived]
        images = np.concatenate([scene.images, np.stack(derived, axis=1)], axis=1)
        return SceneImages(self._add_streams(scene.info), images, scene.failures)

    def load_image(self, index: Any, frame: int, stream: str, preprocess: Preprocess) -> UInt8[np.ndarray, "R R 3"]:
        if stream not in self._derived:
            return self._source.load_image(index, frame, stream, preprocess)
        rgb = self._source.load_image(index, frame, "rgb", preprocess)
        return derive(stream, rgb[None], self._source.info(index).key, self._seed)[0]

    def describe(self) -> dict[str, Any]:
        described = self._source.describe()
        derived = [*described.get("derived", []), *self._derived]
        return described | {"derived": derived, "derived_seed": described.get("derived_seed", self._seed)}

    def _add_streams(self, info: SceneInfo) -> SceneInfo:
        return dataclasses.replace(info, streams=self._add_names(info.streams))

    def _add_names(self, streams: tuple[str, ...]) -> tuple[str, ...]:
        if "rgb" not in streams:
            raise UserError(f"derived: streams are computed from rgb, and scenes of {self.name} have none")
        if repeated := [stream for stream in self._derived if stream in streams]:
            raise UserError(f"derived: {repeated[0]!r} is a stream of the source already")
        return (*streams, *self._derived)
