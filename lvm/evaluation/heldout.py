"""Held-out scenes with their true images and their codes: what every evaluation is asked on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import Failure, ImageSource, SceneInfo
from lvm.data.mixture import split
from lvm.data.mixture.recipes import Recipe
from lvm.data.streams.codecs import Codec


@dataclasses.dataclass(frozen=True)
class HeldoutScene:
    """One scene: true images uint8 [T, S, R, R, 3] and their codes int32 [T, S, N]."""

    info: SceneInfo
    images: np.ndarray
    codes: np.ndarray

    def image(self, frame: int, stream: str) -> np.ndarray:
        return self.images[frame, self.info.streams.index(stream)]  # [R, R, 3]

    def grid(self, frame: int, stream: str) -> np.ndarray:
        return self.codes[frame, self.info.streams.index(stream)]  # [N]


class Heldout:
    """The held-out scenes of a source, encoded.

    Args:
      source: the scenes.
      fraction: the share that training held out; None takes all scenes, of a source that training never saw.
      max_scenes: at most that many are read.
      encode: images uint8 [B, R, R, 3] → codes int32 [B, N].

    Attributes:
      scenes: those that could be read.
      codecs: stream name → codec.
      failures: frames that could not be read.

    Raises:
      UserError: nothing is held out, or nothing of it can be read.
    """

    def __init__(
        self,
        source: ImageSource,
        fraction: float | None,
        max_scenes: int,
        encode: Callable[[np.ndarray], np.ndarray],
    ):
        hashes = np.array([split.group_hash(source.info(i).group) for i in range(len(source))], np.uint64)
        mask = np.ones(len(hashes), bool) if fraction is None else split.heldout_mask(hashes, fraction)
        numbers = np.flatnonzero(mask)
        numbers = numbers[
            :: max(1, -(-len(numbers) // max_scenes))
        ]  # spread over the source, which may be sorted by class
        self.codecs: dict[str, Codec] = dict(source.streams)
        self.scenes: list[HeldoutScene] = []
        self.failures: list[Failure] = []
        for number in numbers:
            loaded = source.load(int(number))
            self.failures += loaded.failures
            if len(loaded.images):
                flat = loaded.images.reshape(-1, *loaded.images.shape[2:])  # [T·S, R, R, 3]
                codes = encode(flat).reshape(*loaded.images.shape[:2], -1)  # [T, S, N]
                self.scenes.append(HeldoutScene(loaded.info, loaded.images, codes))
        for failure in self.failures:
            log_info(f"skipped {failure.key}: {failure.reason}")
        if not self.scenes:
            raise UserError("no held-out scene can be read; heldout_fraction must be the training's, above 0")

    def with_streams(self, streams: Sequence[str], min_frames: int = 1) -> list[HeldoutScene]:
        """The scenes that have these streams and as many frames."""
        return [
            scene
            for scene in self.scenes
            if set(streams) <= set(scene.info.streams) and len(scene.images) >= min_frames
        ]

    def images(self, stream: str) -> np.ndarray:
        """All images of a stream, uint8 [n, R, R, 3]."""
        return np.concatenate(
            [scene.images[:, scene.info.streams.index(stream)] for scene in self.with_streams([stream])]
        )

    def codes(self, stream: str) -> np.ndarray:
        """Their codes, int32 [n, N]."""
        return np.concatenate(
            [scene.codes[:, scene.info.streams.index(stream)] for scene in self.with_streams([stream])]
        )

    def sentences(self, recipe: Recipe, count: int, seed: int) -> np.ndarray | None:
        """`count` sentences by a recipe, int32 [count, grids, N]; None where the scenes don't allow one."""
        usable = self.with_streams(recipe.streams, recipe.min_frames)
        if len(usable) < recipe.num_scenes:
            return None
        sentences = []
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            chosen = [usable[i] for i in rng.permutation(len(usable))[: recipe.num_scenes]]
            grids = recipe.sample_one([len(scene.images) for scene in chosen], rng)
            sentences.append(np.stack([chosen[g.scene].grid(g.frame, g.stream) for g in grids]))
        return np.stack(sentences)
