"""Held-out scenes with their images and codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8, UInt64

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.data.images.sources import Failure, ImageSource, SceneInfo
from lvm.data.mixture import split
from lvm.data.mixture.recipes import Recipe
from lvm.data.streams.codecs import Codec


@dataclasses.dataclass(frozen=True)
class HeldoutScene:
    """A scene with its images and their codes: T frames of S streams."""

    info: SceneInfo
    images: UInt8[np.ndarray, "T S R R 3"]
    codes: Integer[np.ndarray, "T S N"]

    def image(self, frame: int, stream: str) -> UInt8[np.ndarray, "R R 3"]:
        return self.images[frame, self.info.streams.index(stream)]

    def grid(self, frame: int, stream: str) -> Integer[np.ndarray, " N"]:
        return self.codes[frame, self.info.streams.index(stream)]

    def swapped(self, first: str, second: str) -> "HeldoutScene":
        """The scene with the names of two streams exchanged."""
        names = {first: second, second: first}
        streams = tuple(names.get(stream, stream) for stream in self.info.streams)
        return dataclasses.replace(self, info=dataclasses.replace(self.info, streams=streams))


class Heldout:
    """The held-out scenes of an image source, encoded.

    Args:
      fraction: `heldout_fraction` of training; None takes all scenes, of a source that training never saw.
      max_scenes: upper limit; scenes are spread over the source, which may be sorted by class.
      encode: images uint8 [B, R, R, 3] → codes int32 [B, N].

    Attributes:
      scenes: the readable ones.
      codecs: stream name → codec.
      failures: frames that could not be read.

    Raises:
      UserError: no scene is held out, or none can be read.
    """

    def __init__(
        self, source: ImageSource, fraction: float | None, max_scenes: int, encode: Callable[[np.ndarray], np.ndarray]
    ):
        hashes = np.array([split.group_hash(source.info(i).group) for i in range(len(source))], np.uint64)
        mask = np.ones(len(hashes), bool) if fraction is None else split.heldout_mask(hashes, fraction)
        indices = np.flatnonzero(mask)
        self.codecs: dict[str, Codec] = dict(source.streams)
        self.scenes: list[HeldoutScene] = []
        self.failures: list[Failure] = []
        for index in indices[:: max(1, -(-len(indices) // max_scenes))].tolist():
            loaded = source.load(index)
            self.failures += loaded.failures
            if len(loaded.images):
                codes = encode(loaded.images.reshape(-1, *loaded.images.shape[2:]))  # [T·S, N]
                codes = codes.reshape(*loaded.images.shape[:2], -1)
                self.scenes.append(HeldoutScene(loaded.info, loaded.images, codes))
        for failure in self.failures:
            log_warning(f"skipped {failure.key}: {failure.reason}")
        if not self.scenes:
            selected = "" if fraction is None else f" is held out by heldout_fraction={fraction}, that of training, and"
            raise UserError(
                f"no scene of {source.name}{selected} can be read: {len(indices)} of {len(source)} were tried"
            )

    def with_streams(self, streams: Sequence[str], min_frames: int = 1) -> list[HeldoutScene]:
        """The scenes that have all of these streams and at least `min_frames` frames."""
        return [s for s in self.scenes if set(streams) <= set(s.info.streams) and len(s.images) >= min_frames]

    def images(self, stream: str) -> UInt8[np.ndarray, "n R R 3"]:
        """All images of a stream."""
        return np.concatenate([s.images[:, s.info.streams.index(stream)] for s in self.with_streams([stream])])

    def codes(self, stream: str) -> Integer[np.ndarray, "n N"]:
        """Codes of `images`."""
        return np.concatenate([s.codes[:, s.info.streams.index(stream)] for s in self.with_streams([stream])])

    def groups(self, stream: str) -> list[str]:
        """The original of each of `images`."""
        return [scene.info.group for scene in self.with_streams([stream]) for _ in scene.images]

    def sentences(
        self, recipe: Recipe, count: int, seed: int
    ) -> tuple[Integer[np.ndarray, "count G N"], UInt64[np.ndarray, "count G"]] | None:
        """Samples `count` sentences of a recipe; None if there are too few suitable scenes.

        Returns:
          Their codes, and the group hash of each grid.
        """
        usable = self.with_streams(recipe.streams, recipe.min_frames)
        if len(usable) < recipe.num_scenes:
            return None
        sentences, groups = [], []
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            scenes = [usable[i] for i in rng.permutation(len(usable))[: recipe.num_scenes]]
            grids = recipe.sample_one([len(scene.images) for scene in scenes], rng)
            sentences.append(np.stack([scenes[g.scene].grid(g.frame, g.stream) for g in grids]))
            groups.append([split.group_hash(scenes[grid.scene].info.group) for grid in grids])
        return np.stack(sentences), np.array(groups, np.uint64)


def check_source(source: ImageSource, trained_on: Sequence[Mapping[str, Any]], unseen: bool, path: str) -> None:
    """Checks `unseen` against the sources that a model was trained on, so that no training image counts as held out.

    Raises:
      UserError: `unseen` is declared of a training source, or isn't of another one.
    """

    def scenes(described: Mapping[str, Any]) -> dict[str, Any]:  # derived streams don't change them
        return {key: value for key, value in described.items() if key not in ("derived", "derived_seed")}

    described = scenes(files.as_json(source.describe()))

    def is_same(other: Mapping[str, Any]) -> bool:
        generated = other["kind"] == described["kind"] == "generated"
        same_scenes = generated and all(
            other.get(key) == described.get(key) for key in ("seed", "shapes", "class_hues")
        )
        return scenes(other) == described or same_scenes

    was_seen = any(is_same(other) for other in trained_on)
    if was_seen and unseen:
        raise UserError(f"config.unseen=true, but config.source={path} is what the model was trained on")
    if not was_seen and not unseen:
        raise UserError(
            f"config.source={path} is not what the model was trained on, or has changed since; "
            "if training saw none of its images, set config.unseen=true"
        )
