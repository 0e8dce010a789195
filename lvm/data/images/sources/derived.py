"""A source with streams beside its own that are computed from its rgb."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.data.images.sources.base import Failure, ImageSource, SceneImages, SceneInfo
from lvm.data.streams.codecs import Codec
from lvm.data.streams.derived import DERIVED, derive


class DerivedStreams:
    """An `ImageSource` whose scenes have derived streams after those of another source.

    Args:
      source: has rgb in all scenes.
      derived: names in `lvm.data.streams.derived.DERIVED`.
      seed: of what is drawn.

    Raises:
      UserError: an unknown name, one that is there twice or in the source already, or scenes without rgb.
    """

    def __init__(self, source: ImageSource, derived: Sequence[str], seed: int = 0) -> None:
        for number, stream in enumerate(derived):
            if stream not in DERIVED:
                raise UserError(f"derived: {stream!r} is none; expected some of {', '.join(DERIVED)}")
            if stream in source.streams or stream in derived[:number]:
                raise UserError(f"derived: {stream!r} is a stream of the source already")
        if any("rgb" not in streams for streams in source.stream_sets):
            raise UserError(f"derived: they are computed from rgb, and scenes of {source.name} have none")
        self._source, self._derived, self._seed = source, tuple(derived), seed
        self.name = source.name
        self.classes: tuple[str, ...] = source.classes
        self.skipped: tuple[Failure, ...] = source.skipped
        self.streams: Mapping[str, Codec] = dict(source.streams) | {s: DERIVED[s][1] for s in derived}
        self.stream_sets = tuple(sorted((*streams, *self._derived) for streams in source.stream_sets))

    def __len__(self) -> int:
        return len(self._source)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        return self._with_streams(self._source.info(index))

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        scene = self._source.load(index)
        rgb = scene.images[:, scene.info.streams.index("rgb")]  # [T, R, R, 3]
        more = [derive(stream, rgb, scene.info.key, self._seed) for stream in self._derived]
        images = np.concatenate([scene.images, np.stack(more, axis=1)], axis=1)  # [T, S, R, R, 3]
        return SceneImages(self._with_streams(scene.info), images, scene.failures)

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return self._source.describe() | {"derived": list(self._derived), "derived_seed": self._seed}

    def _with_streams(self, info: SceneInfo) -> SceneInfo:
        return dataclasses.replace(info, streams=(*info.streams, *self._derived))
