"""Recipes: which grids of which scenes make a sentence, in which order. Pure functions of scenes and a seed."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lvm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Grid:
    """One image of a sentence: scene (counted within the sentence), frame, stream name."""

    scene: int
    frame: int
    stream: str


class Recipe(abc.ABC):
    """A rule that turns scenes into sentences; a family of dataclasses told apart by `kind`."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Recipe]]] = {}

    def __init_subclass__(cls) -> None:
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

    @abc.abstractmethod
    def choose(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        """The grids of one sentence.

        Args:
          num_frames: the length of each of `num_scenes` scenes, all ≥ `min_frames`.
          rng: the sentence's own generator.
        """


@dataclasses.dataclass(frozen=True)
class Single(Recipe):
    """One image: a frame drawn at random."""

    kind = "single"
    stream: str = "rgb"

    @property
    def num_grids(self) -> int:
        return 1

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def choose(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        return [Grid(0, int(rng.integers(num_frames[0])), self.stream)]


@dataclasses.dataclass(frozen=True)
class Video(Recipe):
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

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"frames: {self.frames} is not positive")
        if not self.strides or min(self.strides) < 1:
            raise UserError(f"strides: {self.strides} must be positive numbers, at least one")

    @property
    def num_grids(self) -> int:
        return self.frames

    @property
    def min_frames(self) -> int:
        return self._span(min(self.strides))

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def choose(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        fitting = [stride for stride in self.strides if self._span(stride) <= num_frames[0]]
        stride = fitting[rng.integers(len(fitting))]
        start = int(rng.integers(num_frames[0] - self._span(stride) + 1))
        return [Grid(0, start + i * stride, self.stream) for i in range(self.frames)]

    def _span(self, stride: int) -> int:
        return (self.frames - 1) * stride + 1


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
        if self.shots < 1:
            raise UserError(f"shots: {self.shots} is not positive")

    @property
    def num_scenes(self) -> int:
        return self.shots

    @property
    def num_grids(self) -> int:
        return 2 * self.shots

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.source, self.target)

    def choose(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        grids = []
        for scene, length in enumerate(num_frames):
            frame = int(rng.integers(length))
            grids += [Grid(scene, frame, self.source), Grid(scene, frame, self.target)]
        return grids
