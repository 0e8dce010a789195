"""Image source that adds streams computed from the rgb of another source."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.data.images.sources.base import ImageSource, SceneImages, SceneInfo
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
            if stream in source.streams or stream in derived[:i]:
                raise UserError(f"derived: {stream!r} is a stream of the source already")
        if any("rgb" not in streams for streams in source.stream_sets):
            raise UserError(f"derived: streams are computed from rgb, and scenes of {source.name} have none")
        self._source, self._derived, self._seed = source, tuple(derived), seed
        self.name, self.classes, self.skipped = source.name, source.classes, source.skipped
        self.streams = dict(source.streams) | {stream: DERIVED[stream][1] for stream in derived}
        self.stream_sets = tuple(sorted((*streams, *self._derived) for streams in source.stream_sets))

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

    def describe(self) -> dict[str, Any]:
        return self._source.describe() | {"derived": list(self._derived), "derived_seed": self._seed}

    def _list_scenes(self) -> list[tuple[SceneInfo, None]]:
        return []  # the source's

    def _add_streams(self, info: SceneInfo) -> SceneInfo:
        return dataclasses.replace(info, streams=(*info.streams, *self._derived))
