"""The sentences of one component: scenes in a new order each epoch, cut by the recipe."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, Shaped, UInt16, UInt64

from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_tuples
from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.recipes import Grids, Recipe
from lvm.data.mixture.sampler import ClassSampler, RankIndex, RunIndex, SceneSampler, split_chunks
from lvm.data.mixture.split import heldout_mask
from lvm.data.store.concat import AnyStore
from lvm.data.store.grid_reads import Reads, read_intact
from lvm.data.store.manifest import LISTED_SHARE
from lvm.data.store.reader import Store

_MIN_SAMPLE = 2**12  # groups that an estimate needs
_SAMPLE = 2**22  # groups that are counted exactly; more are estimated from about as many


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
    """One component of a mixture.

    Attributes:
      recipe: of its sentences.
      weight: its share of the sentences or of the codes (`weigh_by`), relative to the other weights.
      store: its scene stores, or JSONL files of sentences, read as one; () means the mixture's.
      max_repetitions: limit on how often an original image or video is shown; 0 sets none. Scenes of one group are
        copies of one original: with 4 scenes a group, an epoch shows it 4 times.
    """

    recipe: Recipe
    weight: float = 1.0
    store: tuple[str, ...] = ()
    max_repetitions: float = 0.0

    def __post_init__(self) -> None:
        check_non_negative(self, "weight", "max_repetitions")
        check_tuples(self, "store")
        if math.inf in (self.weight, self.max_repetitions):
            raise UserError(f"weight={self.weight} and max_repetitions={self.max_repetitions} must be finite")


class ComponentSentences:
    """The sentences of one component in one split.

    Args:
      name, config: of the component.
      store: its scenes.
      heldout_fraction, split: "train" takes the groups that aren't held out, "heldout" the others.
      seed, shuffle: of the order.

    Attributes:
      num_scenes: scenes that an epoch samples from.
      num_excluded: scenes of this split that lack frames or streams for the recipe, or whose class is too small.
      sentences_per_epoch: sentences in an epoch.
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
        self._seed, self._heldout_fraction, self._split = seed, heldout_fraction, split
        scenes, split_size = self._select_scenes()
        k = config.recipe.num_scenes
        self._sampler: SceneSampler | ClassSampler
        if config.recipe.same_class:
            self._sampler = ClassSampler(scenes, self._class_ids, k, seed, shuffle)
        else:
            self._sampler = SceneSampler(scenes, k, seed, shuffle)
        self.num_scenes = len(scenes) - self._sampler.num_excluded
        self.num_excluded = split_size - self.num_scenes
        self.sentences_per_epoch = self._sampler.sentences_per_epoch
        columns = [[names.index(s) if s in names else -1 for s in self.recipe.streams] for names in store.stream_sets]
        self._columns = np.array(columns).reshape(len(store.stream_sets), -1)  # [stream sets, streams]

    def _select_scenes(self) -> tuple[RankIndex | RunIndex, int]:
        """The usable scenes of the split, and the number of all; without a look at indexes where the manifest tells."""
        store, kinds = self.store, self.store.kinds
        heldout = None if kinds is None else store.heldout_scenes(self._heldout_fraction)
        if kinds is None or heldout is None:
            split_size = sum(int(self._in_split(entries).sum()) for entries in split_chunks(store.indexes))
            return RankIndex(store.indexes, self._is_usable), split_size
        usable = kinds[usable_mask(store, self.recipe, kinds)]
        is_train = self._split != "heldout"
        scenes = RunIndex.within(usable["first"], usable["count"], heldout, inverse=is_train)
        return scenes, len(store) - len(heldout) if is_train else len(heldout)

    def shortage(self) -> str:
        """The reason why an epoch has no sentence, or ""."""
        if self.sentences_per_epoch:
            return ""
        k = self.recipe.num_scenes
        if isinstance(self._sampler, ClassSampler):
            return (
                f"no class has {k} usable {self._split} scenes in {self.store.path}, "
                f"the largest has {self._sampler.largest_class}"
            )
        return f"{self.num_scenes} usable {self._split} scenes in {self.store.path}, a sentence needs {k}"

    def sentence(self, index: int) -> Int32[np.ndarray, "grids N"]:
        """The codes of the sentence at `index`."""
        return self.sentences(np.array([index]))[0].astype(np.int32)

    def sentences(self, indices: Int[np.ndarray, " n"]) -> UInt16[np.ndarray, "n grids N"]:
        """The codes of the sentences at `indices`."""
        codes = read_intact(self.reads(indices))
        return codes.reshape(len(indices), self.recipe.num_grids, -1)

    def groups(self, indices: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, "n grids"]:
        """The group hash of each grid of the sentences at `indices`."""
        scenes, _ = self.select_grids(indices)
        distinct, inverse = np.unique(scenes, return_inverse=True)
        return self.store.groups(distinct)[inverse].reshape(scenes.shape)

    def reads(self, indices: Int[np.ndarray, " n"]) -> Reads:
        """The reads of the sentences at `indices`, grid after grid, to be done with those of other components."""
        _, grids, entries = self._select(indices)
        columns = self._columns[entries["stream_set"], grids.streams]
        return self.store.reads(entries.ravel(), grids.frames.ravel(), columns.ravel())

    def select_grids(self, indices: Int[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, "n grids"], Grids]:
        """The scene index of each grid of the sentences at `indices`, and the grids."""
        scenes, grids, _ = self._select(indices)
        return np.take_along_axis(scenes, grids.scenes, axis=1), grids

    def _select(self, indices: np.ndarray) -> tuple[np.ndarray, Grids, np.ndarray]:
        """Scenes int64 [n, scenes] of sentences, their grids, and the store's entry of each grid [n, grids]."""
        scenes = np.empty((len(indices), self.recipe.num_scenes), np.int64)
        epochs, remainders = np.divmod(indices, self.sentences_per_epoch)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            scenes[mask] = self._sampler.sample(remainders[mask], int(epoch))
        entries = self.store.entries(scenes.ravel()).reshape(scenes.shape)
        grids = self.recipe.sample(entries["frames"].astype(np.int64), CounterRng(self._seed, indices))
        return scenes, grids, np.take_along_axis(entries, grids.scenes, axis=1)

    @functools.cached_property
    def scenes_per_group(self) -> float:
        """Mean number of scenes of an original image or video; estimated from a sample if there are millions."""
        if self.num_scenes > _SAMPLE and isinstance(self.store, Store) and self.store.kinds is not None:
            listed = self.store.heldout["group"]  # of hashes below a threshold, so this is a random sample
            if len(listed := listed[listed < int(LISTED_SHARE * 2**64)]) >= _MIN_SAMPLE:
                return len(listed) / len(np.unique(listed))
        share = max(1, self.num_scenes // _SAMPLE)
        groups, num_scenes = np.zeros(0, np.uint64), 0
        for entries in split_chunks(self.store.indexes):
            chunk = entries["group"][self._is_usable(entries)]
            chunk = chunk[chunk % np.uint64(share) == 0]  # groups are hashes, so this is a random sample
            groups, num_scenes = np.union1d(groups, chunk), num_scenes + len(chunk)
        return num_scenes / max(1, len(groups))

    def repetitions(self, count: int) -> float:
        """Mean number of times that the first `count` sentences show an original."""
        return count / self.sentences_per_epoch * self.scenes_per_group

    def check_repetitions(self, count: int) -> None:
        """Raises UserError if the first `count` sentences exceed `max_repetitions`."""
        limit = self.config.max_repetitions
        if limit and self.repetitions(count) > limit:
            raise UserError(
                f"config.data.components.{self.name}.max_repetitions={limit:g} is exceeded: {count} sentences are "
                f"{count / self.sentences_per_epoch:.4g} epochs and show an original {self.repetitions(count):.4g} "
                "times; use a smaller weight, fewer steps or more scenes"
            )

    def _in_split(self, entries: np.ndarray) -> np.ndarray:
        heldout = heldout_mask(entries["group"], self._heldout_fraction, self.store.group_hashes)
        return heldout if self._split == "heldout" else ~heldout

    def _is_usable(self, entries: np.ndarray) -> np.ndarray:
        return self._in_split(entries) & usable_mask(self.store, self.recipe, entries)

    def _class_ids(self, scenes: np.ndarray) -> np.ndarray:
        parts = np.array_split(scenes, max(1, len(scenes) // _SAMPLE))
        return np.concatenate([self.store.entries(part)["class_id"] for part in parts])


def usable_mask(store: AnyStore, recipe: Recipe, entries: Shaped[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Marks the scenes that have the streams and frames, and if required a class, for a recipe."""
    has_streams = np.array([set(recipe.streams) <= set(names) for names in store.stream_sets], bool)
    mask = has_streams[entries["stream_set"]] & (entries["frames"] >= recipe.min_frames)
    return mask & (entries["class_id"] >= 0) if recipe.same_class else mask
