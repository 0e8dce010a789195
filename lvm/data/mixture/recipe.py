"""Base of recipes: the grids of a sentence, in order, as a pure function of scene lengths and a random stream."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, Int64

from lvm.data.mixture.counter_rng import CounterRng


@dataclasses.dataclass(frozen=True)
class Grid:
    """One image of a sentence: scene (counted within the sentence), frame, stream name."""

    scene: int
    frame: int
    stream: str


@dataclasses.dataclass(frozen=True)
class Grids:
    """The images of n sentences, G each, in order.

    Attributes:
      scenes: counted within the sentence.
      frames: of the scene.
      streams: indices into the recipe's `streams`.
    """

    scenes: Int[np.ndarray, "n G"]
    frames: Int[np.ndarray, "n G"]
    streams: Int[np.ndarray, "n G"]


class Recipe(abc.ABC):
    """A rule that turns scenes into sentences; a family of dataclasses selected by `kind`."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Recipe]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Recipe.kinds[cls.kind] = cls

    @property
    def num_scenes(self) -> int:
        """Scenes in a sentence."""
        return 1

    @property
    def same_class(self) -> bool:
        """Whether all scenes of a sentence must be of one class."""
        return False

    @property
    @abc.abstractmethod
    def num_grids(self) -> int:
        """Grids in a sentence; the same for all sentences of a recipe."""

    @property
    def min_frames(self) -> int:
        """Frames that a scene must have."""
        return 1

    @property
    @abc.abstractmethod
    def streams(self) -> tuple[str, ...]:
        """Streams that a scene must have."""

    @property
    def answer_mask(self) -> Bool[np.ndarray, " G"]:
        """The grids that are predictable from those before them; in a plain sequence, all but the first."""
        return np.arange(self.num_grids) > 0

    @abc.abstractmethod
    def sample(self, num_frames: Int64[np.ndarray, "n scenes"], rng: CounterRng) -> Grids:
        """Samples the grids of n sentences.

        Args:
          num_frames: of each scene, all ≥ `min_frames`.
          rng: one random stream for each sentence.
        """

    def sample_one(self, num_frames: Sequence[int], rng: np.random.Generator) -> list[Grid]:
        """Samples the grids of one sentence from scenes of `num_frames` frames; consumes one number of `rng`."""
        stream = CounterRng(int(rng.integers(2**63)), np.zeros(1, np.int64))
        grids = self.sample(np.array([num_frames], np.int64), stream)
        columns = (grids.scenes[0].tolist(), grids.frames[0].tolist(), grids.streams[0].tolist())
        return [Grid(scene, frame, self.streams[i]) for scene, frame, i in zip(*columns, strict=True)]
