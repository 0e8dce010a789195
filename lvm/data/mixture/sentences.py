"""The sentences of one component: scenes in a new order each epoch, cut by the recipe."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from lvm.common.errors import UserError
from lvm.data.mixture import sampler
from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.recipes import Grids, Recipe
from lvm.data.store.jsonl import JsonlStore
from lvm.data.store.reader import Store

AnyStore = Store | JsonlStore
_COUNTED = 2**22  # groups that are counted one by one; of more, a part is


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
    """One part of a mixture.

    Attributes:
      recipe: what its sentences are.
      weight: its share, relative to the other weights, of the sentences or of the codes (`weigh_by`).
      store: its scene store, or a JSONL file of sentences; "" means the mixture's.
      max_repetitions: how often an original image or video may come; 0 sets no limit. Scenes of one group are
        copies of one original: where an original has 4 of them, an epoch repeats it 4 times.
    """

    recipe: Recipe
    weight: float = 1.0
    store: str = ""
    max_repetitions: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"weight: {self.weight} is not a number from 0 on")
        if not 0 <= self.max_repetitions < math.inf:
            raise UserError(f"max_repetitions: {self.max_repetitions} is not a number from 0 on")


class ComponentSentences:
    """The sentences of one component.

    Args:
      name: in the mixture.
      config: its part there.
      store: its scenes.
      heldout_fraction, split: "train" takes the groups that aren't held out, "heldout" the others.
      seed, shuffle: of the order.

    Attributes:
      num_scenes: scenes that an epoch draws from.
      sentences_per_epoch: sentences an epoch.
      num_excluded: scenes of this split that lack frames or streams for the recipe, or whose class is too small.
    """

    def __init__(
        self,
        name: str,
        config: ComponentConfig,
        store: AnyStore,
        heldout_fraction: float,
        split: str,
        seed: int,
        shuffle: str,
    ):
        self.name, self.recipe, self.config, self.store = name, config.recipe, config, store
        self._seed, self._heldout_fraction, self._side = seed, heldout_fraction, split
        selection = sampler.RankIndex(store.indexes, lambda entries: self._keep(entries))
        in_split = sum(int(self._in_split(entries).sum()) for entries in sampler.split_chunks(store.indexes))
        k = config.recipe.num_scenes
        self._order: sampler.SceneSampler | sampler.ClassSampler
        if config.recipe.same_class:
            self._order = sampler.ClassSampler(
                selection, lambda numbers: _class_ids(store, numbers), k, seed, shuffle
            )
        else:
            self._order = sampler.SceneSampler(selection, k, seed, shuffle)
        self.num_scenes = len(selection) - self._order.num_excluded
        self.num_excluded = in_split - self.num_scenes
        self.sentences_per_epoch = self._order.sentences_per_epoch
        self._columns = np.array(
            [
                [names.index(s) if s in names else -1 for s in self.recipe.streams]
                for names in store.stream_sets
            ]
        ).reshape(len(store.stream_sets), -1)  # [stream sets, streams of the recipe]

    def shortage(self) -> str:
        """Why there is no sentence, or ""."""
        if self.sentences_per_epoch:
            return ""
        k = self.recipe.num_scenes
        if isinstance(self._order, sampler.ClassSampler):
            return (
                f"no class has {k} {self._side} scenes in {self.store.path} with the streams and frames for it, "
                f"the largest has {self._order.largest}"
            )
        return (
            f"{self.num_scenes} {self._side} scenes in {self.store.path} have the streams and frames for it, "
            f"{k} are needed for a sentence"
        )

    def sentence(self, number: int) -> np.ndarray:
        """The codes of the component's sentence at `number`: int32 [grids, N]."""
        return self.sentences(np.array([number]))[0].astype(np.int32)

    def sentences(self, numbers: np.ndarray) -> np.ndarray:
        """The codes of the sentences at `numbers`, int64 [n]: uint16 [n, grids, N]."""
        _, grids, entries = self._choose(numbers)
        columns = self._columns[entries["stream_set"], grids.streams]
        codes = self.store.grids(entries.ravel(), grids.frames.ravel(), columns.ravel())
        return codes.reshape(*entries.shape, -1)

    def select_grids(self, numbers: np.ndarray) -> tuple[np.ndarray, Grids]:
        """Scene numbers int64 [n, grids] of the sentences at `numbers`, and which of their grids."""
        scenes, grids, _ = self._choose(numbers)
        return np.take_along_axis(scenes, grids.scenes, axis=1), grids

    def _choose(self, numbers: np.ndarray) -> tuple[np.ndarray, Grids, np.ndarray]:
        """Scene numbers int64 [n, scenes] of sentences, their grids, and the store's entry of each grid [n, grids]."""
        scenes = np.empty((len(numbers), self.recipe.num_scenes), np.int64)
        epoch_of, places = np.divmod(numbers, self.sentences_per_epoch)
        for epoch in np.unique(epoch_of):
            mine = epoch_of == epoch
            scenes[mine] = self._order.scenes(places[mine], int(epoch))
        entries = self.store.entries(scenes.ravel()).reshape(scenes.shape)
        grids = self.recipe.sample(entries["frames"].astype(np.int64), CounterRng(self._seed, numbers))
        return scenes, grids, np.take_along_axis(entries, grids.scenes, axis=1)

    @functools.cached_property
    def scenes_per_group(self) -> float:
        """Scenes an original: how often an epoch repeats it. Estimated where there are millions of originals."""
        share = max(
            1, self.num_scenes // _COUNTED
        )  # groups are told apart by hashes: a range of them is a sample
        groups = np.zeros(0, np.uint64)
        scenes = 0
        for entries in sampler.split_chunks(self.store.indexes):
            mine = entries["group"][self._keep(entries)]
            mine = mine[mine % np.uint64(share) == 0]
            groups, scenes = np.union1d(groups, mine), scenes + len(mine)
        return scenes / max(1, len(groups))

    def repetitions(self, count: int) -> float:
        """How often `count` sentences show an original, on average."""
        return count / self.sentences_per_epoch * self.scenes_per_group

    def check_repetitions(self, count: int) -> None:
        """Raises UserError where the first `count` sentences would show originals too often."""
        limit = self.config.max_repetitions
        if limit and self.repetitions(count) > limit:
            raise UserError(
                f"config.data.components.{self.name}.max_repetitions: {count} sentences are "
                f"{count / self.sentences_per_epoch:.4g} epochs of it "
                f"and show an original {self.repetitions(count):.4g} "
                f"times, more than {limit:g}; "
                "a smaller weight, fewer steps or more scenes would do"
            )

    def _in_split(self, entries: np.ndarray) -> np.ndarray:
        heldout = self.store.heldout(self._heldout_fraction, entries)
        return heldout if self._side == "heldout" else ~heldout

    def _keep(self, entries: np.ndarray) -> np.ndarray:
        return self._in_split(entries) & usable(self.store, self.recipe, entries)


def _class_ids(store: AnyStore, numbers: np.ndarray) -> np.ndarray:
    parts = np.array_split(numbers, max(1, len(numbers) // _COUNTED))
    return np.concatenate([store.entries(part)["class_id"] for part in parts])


def usable(store: AnyStore, recipe: Recipe, entries: np.ndarray) -> np.ndarray:
    """bool [n]: which scenes have the streams and frames for a recipe, and a class where it asks for one."""
    has = np.array([set(recipe.streams) <= set(names) for names in store.stream_sets], bool)
    fits = has[entries["stream_set"]] & (entries["frames"] >= recipe.min_frames)
    return fits & (entries["class_id"] >= 0) if recipe.same_class else fits
