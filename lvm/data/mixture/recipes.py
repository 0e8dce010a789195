"""Recipes: which grids of which scenes make a sentence, in which order. Pure functions of scenes and a seed."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from lvm.common.errors import UserError
from lvm.data.mixture.counter_rng import CounterRng


@dataclasses.dataclass(frozen=True)
class Grid:
    """One image of a sentence: scene (counted within the sentence), frame, stream name."""

    scene: int
    frame: int
    stream: str


@dataclasses.dataclass(frozen=True)
class Grids:
    """The images of n sentences, G each, in their order.

    Attributes:
      scenes: int64 [n, G], counted within the sentence.
      frames: int64 [n, G].
      streams: int64 [n, G], places in the recipe's `streams`.
    """

    scenes: np.ndarray
    frames: np.ndarray
    streams: np.ndarray


class Recipe(abc.ABC):
    """A rule that turns scenes into sentences; a family of dataclasses told apart by `kind`."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Recipe]]] = {}
    same_class: ClassVar[bool] = False  # whether the scenes of a sentence must be of one class

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Recipe.kinds[cls.kind] = cls

    @property
    def num_scenes(self) -> int:
        """Scenes a sentence."""
        return 1

    @property
    @abc.abstractmethod
    def num_grids(self) -> int:
        """Grids a sentence; the same for all sentences of a recipe."""

    @property
    def min_frames(self) -> int:
        """Frames that a scene must have."""
        return 1

    @property
    @abc.abstractmethod
    def streams(self) -> tuple[str, ...]:
        """Streams that a scene must have."""

    @property
    def answer_mask(self) -> np.ndarray:
        """bool [G]: the grids that follow from those before them; in a sequence, all but the first."""
        return np.arange(self.num_grids) > 0

    @abc.abstractmethod
    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        """The grids of n sentences.

        Args:
          num_frames: int64 [n, `num_scenes`], the frames of each scene, all ≥ `min_frames`.
          rng: the sentences' own random numbers.
        """

    def sample_one(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        """The grids of one sentence, from scenes of `num_frames` frames; takes one number of `rng`."""
        seeded = CounterRng(int(rng.integers(2**63)), np.zeros(1, np.int64))
        grids = self.sample(np.array([num_frames], np.int64), seeded)
        places = zip(
            grids.scenes[0].tolist(), grids.frames[0].tolist(), grids.streams[0].tolist(), strict=True
        )
        return [Grid(scene, frame, self.streams[stream]) for scene, frame, stream in places]


def _grids(like: np.ndarray, scenes: Any, frames: Any, streams: Any) -> Grids:
    """`Grids` of parts that are broadcast to the shape of `like`."""
    return Grids(*(np.broadcast_to(part, like.shape) for part in (scenes, frames, streams)))


def _check_positive(recipe: Any, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) < 1:
            raise UserError(f"{name}: {getattr(recipe, name)} is not positive")


def _check_differ(recipe: Any) -> None:
    if recipe.input == recipe.target:
        raise UserError(f"target: {recipe.target!r} is the input too; they must be two streams")


@dataclasses.dataclass(frozen=True)
class Single(Recipe):
    """One image: a frame drawn at random. It has no answers."""

    kind = "single"
    stream: str = "rgb"

    @property
    def num_grids(self) -> int:
        return 1

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        return _grids(num_frames, 0, rng.integers(num_frames), 0)


class _Strided(Recipe):
    """Frames at a stride, from a random start; what videos with and without annotations share."""

    frames: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_positive(self, "frames")
        if not self.strides or min(self.strides) < 1:
            raise UserError(f"strides: {self.strides} must be positive numbers, at least one")

    @property
    def min_frames(self) -> int:
        return (self.frames - 1) * min(self.strides) + 1

    def _frames(self, num_frames: np.ndarray, rng: CounterRng) -> np.ndarray:
        """int64 [n, frames]: every stride that fits is as likely, then every start."""
        length, strides = num_frames[:, 0], np.array(self.strides)
        fits = (self.frames - 1) * strides < length[:, None]  # [n, strides]
        which = rng.integers(np.count_nonzero(fits, axis=1))
        stride = strides[np.argmax(np.cumsum(fits, axis=1) > which[:, None], axis=1)]  # [n]
        start = rng.integers(length - (self.frames - 1) * stride)
        return start[:, None] + np.arange(self.frames) * stride[:, None]


@dataclasses.dataclass(frozen=True)
class Video(_Strided):
    """Consecutive frames at a stride, from a random start.

    Attributes:
      frames: images a sentence; the paper takes 16.
      strides: one is drawn for each sentence among those that the scene is long enough for; the paper's are
        10, 20, 30. Scenes too short for the smallest are left out.
    """

    kind = "video"
    stream: str = "rgb"
    frames: int = 16
    strides: tuple[int, ...] = (10, 20, 30)

    @property
    def num_grids(self) -> int:
        return self.frames

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = self._frames(num_frames, rng)
        return _grids(frames, 0, frames, 0)


@dataclasses.dataclass(frozen=True)
class Rotation(Recipe):
    """The views of an object in their order around it, from a random one on; the last is followed by the first.

    Attributes:
      views: images a sentence; the paper renders 24, 15° apart.
      step: how many views on the next one is. A sentence never goes more than once around.
    """

    kind = "rotation"
    stream: str = "rgb"
    views: int = 24
    step: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "views", "step")

    @property
    def num_grids(self) -> int:
        return self.views

    @property
    def min_frames(self) -> int:
        return self.views * self.step

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = (rng.integers(num_frames) + np.arange(self.views) * self.step) % num_frames
        return _grids(frames, 0, frames, 0)


@dataclasses.dataclass(frozen=True)
class Category(Recipe):
    """Images of one class, each from another scene. Classes with too few scenes are left out.

    Attributes:
      images: images a sentence; the paper takes 16.
    """

    kind = "category"
    same_class = True
    stream: str = "rgb"
    images: int = 16

    def __post_init__(self) -> None:
        _check_positive(self, "images")

    @property
    def num_scenes(self) -> int:
        return self.images

    @property
    def num_grids(self) -> int:
        return self.images

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        return _grids(num_frames, np.arange(self.images), rng.integers(num_frames), 0)


@dataclasses.dataclass(frozen=True)
class Pairs(Recipe):
    """x1 y1 x2 y2 …: an image and its annotation, `shots` times, each from another scene.

    Attributes:
      input, target: the streams of x and y.
      shots: pairs a sentence; the paper takes 8.
    """

    kind = "pairs"
    input: str = "rgb"
    target: str = "segmentation"
    shots: int = 8

    def __post_init__(self) -> None:
        _check_positive(self, "shots")
        _check_differ(self)

    @property
    def num_scenes(self) -> int:
        return self.shots

    @property
    def num_grids(self) -> int:
        return 2 * self.shots

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.input, self.target)

    @property
    def answer_mask(self) -> np.ndarray:
        return np.tile([False, True], self.shots)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = np.repeat(rng.integers(num_frames), 2, axis=1)
        places = np.arange(self.num_grids)
        return _grids(frames, places // 2, frames, places % 2)


@dataclasses.dataclass(frozen=True)
class MultiAnnotation(Recipe):
    """Several of an image and its annotations, in an order drawn for the sentence, for several scenes in turn.

    The order is the same for all scenes of a sentence, so that it can be learned from those before. The paper
    names neither the number of streams nor that of scenes; by default they are four by four.

    Attributes:
      input, annotations: the 1 + k streams.
      num_streams: m, how many of them a sentence shows.
      shots: scenes a sentence.
    """

    kind = "multi_annotation"
    input: str = "rgb"
    annotations: tuple[str, ...] = ("segmentation", "depth", "normals", "edges")
    num_streams: int = 4
    shots: int = 4

    def __post_init__(self) -> None:
        _check_positive(self, "shots")
        if len(set(self.streams)) < len(self.streams):
            raise UserError(f"annotations: {self.annotations} with {self.input!r} name a stream twice")
        if not 2 <= self.num_streams <= len(self.streams):
            raise UserError(
                f"num_streams: {self.num_streams} is not from 2 to {len(self.streams)}, the number of streams"
            )

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
        shown = rng.permutations(len(self.streams))[:, : self.num_streams]
        places = np.arange(self.num_grids)
        return _grids(frames, places // self.num_streams, frames, np.tile(shown, (1, self.shots)))


@dataclasses.dataclass(frozen=True)
class _AnnotatedVideo(_Strided):
    input: str = "rgb"
    target: str = "segmentation"
    frames: int = 8
    strides: tuple[int, ...] = (10, 20, 30)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_differ(self)

    @property
    def num_grids(self) -> int:
        return 2 * self.frames

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.input, self.target)


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

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = np.repeat(self._frames(num_frames, rng), 2, axis=1)
        return _grids(frames, 0, frames, np.arange(self.num_grids) % 2)


@dataclasses.dataclass(frozen=True)
class Separated(_AnnotatedVideo):
    """x1 x2 … y1 y2 …: the frames of a video, then their annotations. Attributes: those of `Interleaved`."""

    kind = "separated"

    @property
    def answer_mask(self) -> np.ndarray:
        return np.repeat([False, True], self.frames)

    def sample(self, num_frames: np.ndarray, rng: CounterRng) -> Grids:
        frames = np.tile(self._frames(num_frames, rng), (1, 2))
        return _grids(frames, 0, frames, np.arange(self.num_grids) // self.frames)
