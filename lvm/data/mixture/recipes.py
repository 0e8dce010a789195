"""Recipes: which grids of which scenes make a sentence, in which order. Pure functions of scenes and a seed."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from lvm.common.errors import UserError
from lvm.data.mixture.draws import CounterRng


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
    def answers(self) -> np.ndarray:
        """bool [G]: the grids that follow from those before them; in a sequence, all but the first."""
        return np.arange(self.num_grids) > 0

    @abc.abstractmethod
    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        """The grids of n sentences.

        Args:
          lengths: int64 [n, `num_scenes`], the frames of each scene, all ≥ `min_frames`.
          draws: the sentences' own random numbers.
        """

    def choose(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        """The grids of one sentence, from scenes of `num_frames` frames; takes one number of `rng`."""
        draws = CounterRng(int(rng.integers(2**63)), np.zeros(1, np.int64))
        grids = self.choose_many(np.array([num_frames], np.int64), draws)
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
    if recipe.source == recipe.target:
        raise UserError(f"target: {recipe.target!r} is the source too; they must be two streams")


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

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        return _grids(lengths, 0, draws.below(lengths), 0)


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

    def _frames(self, lengths: np.ndarray, draws: CounterRng) -> np.ndarray:
        """int64 [n, frames]: every stride that fits is as likely, then every start."""
        length, strides = lengths[:, 0], np.array(self.strides)
        fits = (self.frames - 1) * strides < length[:, None]  # [n, strides]
        which = draws.below(np.count_nonzero(fits, axis=1))
        stride = strides[np.argmax(np.cumsum(fits, axis=1) > which[:, None], axis=1)]  # [n]
        start = draws.below(length - (self.frames - 1) * stride)
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

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = self._frames(lengths, draws)
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

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = (draws.below(lengths) + np.arange(self.views) * self.step) % lengths
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

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        return _grids(lengths, np.arange(self.images), draws.below(lengths), 0)


@dataclasses.dataclass(frozen=True)
class Pairs(Recipe):
    """x1 y1 x2 y2 …: an image and its annotation, `shots` times, each from another scene.

    Attributes:
      source, target: the streams of x and y.
      shots: pairs a sentence; the paper takes 8.
    """

    kind = "pairs"
    source: str = "rgb"
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
        return (self.source, self.target)

    @property
    def answers(self) -> np.ndarray:
        return np.tile([False, True], self.shots)

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = np.repeat(draws.below(lengths), 2, axis=1)
        places = np.arange(self.num_grids)
        return _grids(frames, places // 2, frames, places % 2)


@dataclasses.dataclass(frozen=True)
class MultiAnnotation(Recipe):
    """Several of an image and its annotations, in an order drawn for the sentence, for several scenes in turn.

    The order is the same for all scenes of a sentence, so that it can be learned from those before. The paper
    names neither the number of streams nor that of scenes; by default they are four by four.

    Attributes:
      source, annotations: the 1 + k streams.
      chosen: m, how many of them a sentence shows.
      shots: scenes a sentence.
    """

    kind = "multi_annotation"
    source: str = "rgb"
    annotations: tuple[str, ...] = ("segmentation", "depth", "normals", "edges")
    chosen: int = 4
    shots: int = 4

    def __post_init__(self) -> None:
        _check_positive(self, "shots")
        if len(set(self.streams)) < len(self.streams):
            raise UserError(f"annotations: {self.annotations} with {self.source!r} name a stream twice")
        if not 2 <= self.chosen <= len(self.streams):
            raise UserError(
                f"chosen: {self.chosen} is not from 2 to {len(self.streams)}, the number of streams"
            )

    @property
    def num_scenes(self) -> int:
        return self.shots

    @property
    def num_grids(self) -> int:
        return self.chosen * self.shots

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.source, *self.annotations)

    @property
    def answers(self) -> np.ndarray:
        return np.arange(self.num_grids) % self.chosen > 0

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = np.repeat(draws.below(lengths), self.chosen, axis=1)
        shown = draws.shuffled(len(self.streams))[:, : self.chosen]
        places = np.arange(self.num_grids)
        return _grids(frames, places // self.chosen, frames, np.tile(shown, (1, self.shots)))


@dataclasses.dataclass(frozen=True)
class _AnnotatedVideo(_Strided):
    source: str = "rgb"
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
        return (self.source, self.target)


@dataclasses.dataclass(frozen=True)
class Interleaved(_AnnotatedVideo):
    """x1 y1 x2 y2 …: the frames of a video, each followed by its annotation.

    Attributes:
      source, target: the streams of x and y.
      frames, strides: as `Video`'s; 8 frames with their annotations are the paper's 16 images.
    """

    kind = "interleaved"

    @property
    def answers(self) -> np.ndarray:
        return np.tile([False, True], self.frames)

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = np.repeat(self._frames(lengths, draws), 2, axis=1)
        return _grids(frames, 0, frames, np.arange(self.num_grids) % 2)


@dataclasses.dataclass(frozen=True)
class Separated(_AnnotatedVideo):
    """x1 x2 … y1 y2 …: the frames of a video, then their annotations. Attributes: those of `Interleaved`."""

    kind = "separated"

    @property
    def answers(self) -> np.ndarray:
        return np.repeat([False, True], self.frames)

    def choose_many(self, lengths: np.ndarray, draws: CounterRng) -> Grids:
        frames = np.tile(self._frames(lengths, draws), (1, 2))
        return _grids(frames, 0, frames, np.arange(self.num_grids) // self.frames)
