"""Episodes of in-context tasks: a query image, and pairs of an image and its annotation as examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from lvm.common.logging import log_warning
from lvm.evaluation.figures import format_count
from lvm.evaluation.heldout import HeldoutScene

Images = UInt8[np.ndarray, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class Query:
    """A frame to annotate, with frames of other scenes as examples.

    Attributes:
      shown: the stream that its scenes show as the task's target (`showing`), "" for the target itself.
    """

    scene: HeldoutScene
    frame: int
    examples: tuple[tuple[HeldoutScene, int], ...]
    shown: str = ""

    def showing(self, stream: str, target: str) -> Query:
        """The query with `stream` in the place of `target`, so that tasks whose rule changes ask for one target."""
        if stream == target:
            return self
        examples = tuple((scene.swapped(stream, target), frame) for scene, frame in self.examples)
        return Query(self.scene.swapped(stream, target), self.frame, examples, stream)

    def prompt(self, input_stream: str, target_stream: str) -> Integer[np.ndarray, "K N"]:
        """Grids x1 y1 … xn yn xq."""
        streams = (input_stream, target_stream)
        pairs = [scene.grid(frame, stream) for scene, frame in self.examples for stream in streams]
        return np.stack([*pairs, self.scene.grid(self.frame, input_stream)])

    @property
    def group(self) -> str:
        """The original that its scene is of: queries of one aren't independent."""
        return self.scene.info.group

    def to_json(self) -> dict[str, Any]:
        """Keys of the scenes, and frames; the stream that is shown."""
        examples = [[scene.info.key, frame] for scene, frame in self.examples]
        shown = {"shown": self.shown} if self.shown else {}
        return {"query": [self.scene.info.key, self.frame], "examples": examples, **shown}


def make_queries(
    scenes: Sequence[HeldoutScene],
    count: int,
    shots: int,
    seed: int,
    same_class: bool = False,
    same_original: bool = False,
) -> list[Query]:
    """Queries over all scenes in turn, with random frames and examples from scenes of other originals.

    Args:
      scenes: to choose from.
      count: number of queries.
      shots: examples of each.
      seed: query i is a function of the seed, i and the scenes.
      same_class: examples are of the query's class; scenes of a class with too few others are no queries.
      same_original: examples may be other scenes of the query's original.

    Returns:
      The queries; [] for too few scenes.
    """
    classes = np.array([scene.info.class_name if same_class else "" for scene in scenes])
    originals = np.array([scene.info.key if same_original else scene.info.group for scene in scenes])
    kinds = Counter(classes.tolist())
    own = Counter(zip(classes.tolist(), originals.tolist(), strict=True))
    usable = [i for i, pair in enumerate(zip(classes, originals, strict=True)) if kinds[pair[0]] - own[pair] >= shots]
    if 0 < len(usable) < len(scenes):
        log_warning(
            f"{len(scenes) - len(usable)} of {len(scenes)} scenes are no queries: too few others for {shots} examples"
        )
    queries = []
    for index in range(count if usable else 0):
        rng = np.random.default_rng([seed, index])
        scene = usable[index % len(usable)]
        order = rng.permutation(len(scenes)).tolist()
        others = [i for i in order if originals[i] != originals[scene] and classes[i] == classes[scene]][:shots]
        examples = tuple((scenes[i], int(rng.integers(len(scenes[i].images)))) for i in others)
        queries.append(Query(scenes[scene], int(rng.integers(len(scenes[scene].images))), examples))
    return queries


def describe_shortage(
    scenes: Sequence[HeldoutScene], shots: int, same_class: bool = False, same_original: bool = False
) -> str:
    """The reason why `make_queries` has none."""
    of_class = " of its class" if same_class else ""
    count = format_count("suitable held-out scenes", [scene.info.group for scene in scenes])
    if same_original:
        return f"{count}; a query needs {shots} others{of_class}"
    return f"{count}; a query needs {shots}{of_class} of other originals than its own, unless same_original=true"


def first_examples(query: Query, shots: int) -> Query:
    """The query with its first `shots` examples."""
    return dataclasses.replace(query, examples=query.examples[:shots])
