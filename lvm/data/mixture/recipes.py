"""The recipes of sentences: single images, videos, views, classes, pairs and annotated videos."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

from lvm.common.errors import UserError
from lvm.common.validation import check_positive, check_tuples
from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.recipe import Grid, Grids, Recipe

__all__ = [
    "Category", "Grid", "Grids", "Interleaved", "MultiAnnotation", "Pairs", "Recipe", "Rotation", "Separated", "Single",
    "VaryingPairs", "Video",
]  # fmt: skip


def _grids(like: np.ndarray, scenes: Any, frames: Any, streams: Any) -> Grids:
    """`Grids` of arrays broadcast to the shape of `like`."""
    return Grids(*(np.broadcast_to(x, like.shape) for x in (scenes, frames, streams)))


@dataclasses.dataclass(frozen=True)
class _OneStream(Recipe):
    """Shared by recipes over one stream."""

    stream: str = "rgb"

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)


@dataclasses.dataclass(frozen=True)
class _TwoStreams(Recipe):
    """Shared by recipes that pair images x of the stream `input` with their annotations y, the stream `target`."""

    input: str = "rgb"
    target: str = "segmentation"

    def __post_init__(self) -> None:
        if self.input == self.target:
            raise UserError(f"target={self.target!r} must differ from input")

    @property
    def num_grids(self) -> int:
        return len(self.answer_mask)

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.input, self.target)

    @abc.abstractmethod
    def _sample_frames(self, num_frames: np.ndarray, rng: CounterRng) -> np.ndarray:
        """The frames of x, int64 [n, G / 2]."""

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        is_target = self.answer_mask
        pair = np.where(is_target, np.cumsum(is_target), np.cumsum(~is_target)) - 1  # [G]
        frames = self._sample_frames(num_frames, rng)[:, pair]
        return _grids(frames, np.minimum(pair, self.num_scenes - 1), frames, is_target.astype(np.int64))


class _Strided(Recipe):
    """Shared by recipes that take frames at a stride from a random start."""

    frames: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        check_positive(self, "frames")
        if not self.strides or min(self.strides) < 1:
            raise UserError(f"strides={self.strides} must be one or more positive integers")

    @property
    def min_frames(self) -> int:
        return (self.frames - 1) * min(self.strides) + 1

    def _sample_frames(self, num_frames: np.ndarray, rng: CounterRng) -> np.ndarray:
        """int64 [n, frames]: uniform over the strides that fit, then over the starts."""
        length, strides = num_frames[:, 0], np.array(self.strides)
        fits = (self.frames - 1) * strides < length[:, None]  # [n, strides]
        rank = rng.integers(np.count_nonzero(fits, axis=1))
        stride = strides[np.argmax(np.cumsum(fits, axis=1) > rank[:, None], axis=1)]  # [n]
        start = rng.integers(length - (self.frames - 1) * stride)
        return start[:, None] + np.arange(self.frames) * stride[:, None]


@dataclasses.dataclass(frozen=True)
class Single(_OneStream):
    """One image: a random frame. It has no answers."""

    kind = "single"

    @property
    def num_grids(self) -> int:
        return 1

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        return _grids(num_frames, 0, rng.integers(num_frames), 0)


@dataclasses.dataclass(frozen=True)
class Video(_Strided, _OneStream):
    """Frames at a constant stride from a random start.

    Attributes:
      frames: images in a sentence; the paper takes 16.
      strides: one of those that the scene is long enough for is sampled for each sentence; the paper's are 10, 20,
        30. Scenes too short for the smallest are excluded.
    """

    kind = "video"
    frames: int = 16
    strides: tuple[int, ...] = (10, 20, 30)

    @property
    def num_grids(self) -> int:
        return self.frames

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = self._sample_frames(num_frames, rng)
        return _grids(frames, 0, frames, 0)


@dataclasses.dataclass(frozen=True)
class Rotation(_OneStream):
    """Views around an object, in order, from a random one on; the first follows the last.

    Attributes:
      views: images in a sentence; the paper renders 24, 15° apart.
      step: stride between views. A sentence covers at most one revolution.
    """

    kind = "rotation"
    views: int = 24
    step: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "views", "step")

    @property
    def num_grids(self) -> int:
        return self.views

    @property
    def min_frames(self) -> int:
        return self.views * self.step

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = (rng.integers(num_frames) + np.arange(self.views) * self.step) % num_frames
        return _grids(frames, 0, frames, 0)


@dataclasses.dataclass(frozen=True)
class Category(_OneStream):
    """Images of one class, each of another scene. Classes with too few scenes are excluded.

    Attributes:
      images: images in a sentence; the paper takes 16.
    """

    kind = "category"
    images: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "images")

    @property
    def same_class(self) -> bool:
        return True

    @property
    def num_scenes(self) -> int:
        return self.images

    @property
    def num_grids(self) -> int:
        return self.images

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        return _grids(num_frames, np.arange(self.images), rng.integers(num_frames), 0)


class _Alternating(Recipe):
    """Shared by recipes that alternate an image and its annotation, each pair of another scene."""

    shots: int

    @property
    def num_scenes(self) -> int:
        return self.shots

    @property
    def num_grids(self) -> int:
        return 2 * self.shots

    @property
    def answer_mask(self) -> np.ndarray:
        return np.tile([False, True], self.shots)


@dataclasses.dataclass(frozen=True)
class Pairs(_Alternating, _TwoStreams):
    """x1 y1 x2 y2 …: an image and its annotation, `shots` times, each of another scene.

    Attributes:
      input, target: the streams of x and y.
      shots: pairs in a sentence; the paper takes 8.
      same_class: all scenes are of one class, as in few-shot segmentation.
    """

    kind = "pairs"
    shots: int = 8
    same_class: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "shots")
        super().__post_init__()

    def _sample_frames(self, num_frames: np.ndarray, rng: CounterRng) -> np.ndarray:
        return rng.integers(num_frames)


@dataclasses.dataclass(frozen=True)
class VaryingPairs(_Alternating):
    """x1 y1 x2 y2 …, with annotations by a rule of the sentence's own: of one stream, sampled from several.

    Attributes:
      input: the stream of x.
      targets: the streams of which one is that of y.
      shots: pairs in a sentence.
      same_class: as of `Pairs`.
    """

    kind = "varying_pairs"
    input: str = "rgb"
    targets: tuple[str, ...] = ("segmentation", "depth")
    shots: int = 8
    same_class: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "shots")
        check_tuples(self, "targets")
        if len(self.targets) < 2 or len(set(self.streams)) < len(self.streams):
            raise UserError(f"targets={self.targets} must be two streams or more, each once, without {self.input!r}")

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.input, *self.targets)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = np.repeat(rng.integers(num_frames), 2, axis=1)
        target = 1 + rng.integers(np.full(len(num_frames), len(self.targets)))
        return _grids(frames, np.arange(self.num_grids) // 2, frames, np.where(self.answer_mask, target[:, None], 0))


@dataclasses.dataclass(frozen=True)
class MultiAnnotation(Recipe):
    """Several of an image and its annotations, for several scenes in turn, in an order sampled for the sentence.

    The order is the same for all scenes of a sentence, so that it can be inferred from the first ones. The paper
    states neither the number of streams nor that of scenes; the default is four by four.

    Attributes:
      input, annotations: the 1 + k streams.
      num_streams: m, the streams in a sentence.
      shots: scenes in a sentence.
    """

    kind = "multi_annotation"
    input: str = "rgb"
    annotations: tuple[str, ...] = ("segmentation", "depth", "normals", "edges")
    num_streams: int = 4
    shots: int = 4

    def __post_init__(self) -> None:
        check_positive(self, "shots")
        count = len(self.streams)
        if len(set(self.streams)) < count:
            raise UserError(f"annotations={self.annotations} with input {self.input!r} must not repeat a stream")
        if not 2 <= self.num_streams <= count:
            raise UserError(f"num_streams={self.num_streams} must be from 2 to {count}, all streams")

    @property
    def num_scenes(self) -> int:
        return self.shots

    @property
    def num_grids(self) -> int:
        return self.num_streams * self.shots

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.input, *self.annotations)

    @property
    def answer_mask(self) -> np.ndarray:
        return np.arange(self.num_grids) % self.num_streams > 0

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = np.repeat(rng.integers(num_frames), self.num_streams, axis=1)
        streams = rng.permutations(len(self.streams))[:, : self.num_streams]
        scenes = np.arange(self.num_grids) // self.num_streams
        return _grids(frames, scenes, frames, np.tile(streams, (1, self.shots)))


@dataclasses.dataclass(frozen=True)
class _AnnotatedVideo(_Strided, _TwoStreams):
    frames: int = 8
    strides: tuple[int, ...] = (10, 20, 30)

    def __post_init__(self) -> None:
        _Strided.__post_init__(self)
        _TwoStreams.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class Interleaved(_AnnotatedVideo):
    """x1 y1 x2 y2 …: the frames of a video, each followed by its annotation.

    Attributes:
      input, target: the streams of x and y.
      frames, strides: as `Video`'s; 8 frames with their annotations are the paper's 16 images.
    """

    kind = "interleaved"

    @property
    def answer_mask(self) -> np.ndarray:
        return np.tile([False, True], self.frames)


@dataclasses.dataclass(frozen=True)
class Separated(_AnnotatedVideo):
    """x1 x2 … y1 y2 …: the frames of a video, then their annotations. Attributes are `Interleaved`'s."""

    kind = "separated"

    @property
    def answer_mask(self) -> np.ndarray:
        return np.repeat([False, True], self.frames)
