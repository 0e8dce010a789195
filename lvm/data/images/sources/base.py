"""What a source is: scenes of images, listed without decoding and loaded one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lvm.data.streams.codecs import Codec


@dataclasses.dataclass(frozen=True)
class Failure:
    """Something that was found and is not used.

    Attributes:
      key: what it is: a path inside the source, a scene, or a frame of a scene.
      reason: why it is not used.
    """

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SceneInfo:
    """What is known of a scene without decoding it.

    Attributes:
      key: names the scene within its source.
      group: the original photo or video; scenes of one group belong on one side of any split.
      class_name: the class of what it shows, or "".
      num_frames: frames T.
      streams: names of the streams, in the order of its images.
    """

    key: str
    group: str
    class_name: str
    num_frames: int
    streams: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SceneImages:
    """A scene with its images.

    Attributes:
      info: the scene, with the frames that are really there.
      images: uint8 [T, S, R, R, 3], streams in the order of `info.streams`; T may be 0.
      failures: the frames that could not be read and were left out.
    """

    info: SceneInfo
    images: np.ndarray
    failures: tuple[Failure, ...] = ()


@dataclasses.dataclass(frozen=True)
class SceneCodes:
    """A scene whose images are codes already.

    Attributes:
      info: the scene, with the frames that are really there.
      codes: uint16 [T, S, N], streams in the order of `info.streams`; T may be 0.
      failures: what could not be read and was left out.
    """

    info: SceneInfo
    codes: np.ndarray
    failures: tuple[Failure, ...] = ()


class Listing(Protocol):
    """Scenes by number, as they were listed.

    Attributes:
      name: a short name for logs and manifests.
      streams: the codec of every stream that any scene has.
      stream_sets: the distinct stream tuples of the scenes, sorted.
      classes: the distinct class names of the scenes, sorted, without "".
      skipped: what was found when listing and is not used.
    """

    name: str
    streams: Mapping[str, Codec]
    stream_sets: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    skipped: tuple[Failure, ...]

    def __len__(self) -> int:
        """The number of scenes."""

    def info(self, index: int) -> SceneInfo:
        """What is known of scene `index`; `num_frames` counts frames that may yet turn out unreadable.

        Raises IndexError outside of [0, len).
        """

    def describe(self) -> dict[str, Any]:
        """The kind and parameters as JSON: equal for equal sources, wherever they lie."""


@runtime_checkable
class ImageSource(Listing, Protocol):
    """Scenes of images. Loading a scene is a pure function of the source and the number."""

    def load(self, index: int) -> SceneImages:
        """Scene `index` with its images; a frame with any stream that can't be read is left out and listed.

        Raises IndexError outside of [0, len).
        """


@runtime_checkable
class CodeSource(Listing, Protocol):
    """Scenes of ready codes, which no tokenizer encodes.

    Attributes:
      num_codes: size of the codebook; every code lies below.
      grid: rows and columns of an image's codes.
    """

    num_codes: int
    grid: tuple[int, ...]

    def load_codes(self, index: int) -> SceneCodes:
        """Scene `index` with its codes.

        Raises IndexError outside of [0, len).
        """
