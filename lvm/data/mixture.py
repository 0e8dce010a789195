"""Mixtures: which sentence comes n-th, by random access.

Sentences come in blocks of `BLOCK`. Each block holds every source in proportion to its weight, so the number
of sentences (and of tokens) before any block has a closed form: the n-th sentence is found without counting
through those before it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from lvm.console import say
from lvm.data.permutation import permute
from lvm.data.recipes import Recipe
from lvm.data.store import Store
from lvm.errors import UserError

BLOCK = 256
_SCALE = 2**32  # cumulative weights are integers over this, so that sums are exact


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture.

    Attributes:
      recipe: what its sentences are.
      weight: its share of the sentences, relative to the other weights.
      store: its scene store; "" means the mixture's.
    """

    recipe: Recipe
    weight: float = 1.0
    store: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"weight: {self.weight} is not a number from 0 on")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Where sentences come from.

    Attributes:
      sources: name → part.
      store: the scene store of the parts that name none.
      heldout_fraction: share of the groups that training never sees.
      allow_missing: leave out parts whose store lacks their streams or scenes, and say so, instead of failing.
    """

    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    store: str = ""
    heldout_fraction: float = 0.05
    allow_missing: bool = False


class SourceSentences:
    """The sentences of one source: scenes in a new seeded order each epoch, cut by the recipe."""

    def __init__(self, name: str, config: SourceConfig, store: Store, side: np.ndarray, seed: int):
        self.name, self.recipe, self._store = name, config.recipe, store
        usable = _usable(store, config.recipe)
        self._scenes = np.flatnonzero(usable & side)
        self.left_out = int(np.count_nonzero(side & ~usable))
        self.per_epoch = len(self._scenes) // config.recipe.num_scenes
        self._seed = seed
        self._columns = {names: {s: i for i, s in enumerate(names)} for names in store.stream_sets}

    @property
    def num_scenes(self) -> int:
        """Scenes that an epoch draws from."""
        return len(self._scenes)

    def sentence(self, number: int) -> np.ndarray:
        """The codes of the source's sentence at `number`: int32 [grids, N]."""
        k = self.recipe.num_scenes
        epoch, place = divmod(number, self.per_epoch)
        places = np.arange(place * k, (place + 1) * k)
        numbers = self._scenes[permute(places, len(self._scenes), self._seed + epoch)]
        scenes = [self._store.scene(int(number)) for number in numbers]
        rng = np.random.default_rng([self._seed, number])
        grids = self.recipe.choose([len(scene.codes) for scene in scenes], rng)
        rows = []
        for grid in grids:
            scene = scenes[grid.scene]
            column = self._columns[self._store.stream_sets[scene.stream_set]][grid.stream]
            rows.append(scene.codes[grid.frame, column])
        return np.stack(rows).astype(np.int32)


class Mixture:
    """All sentences of a training or held-out side, in their final order.

    Args:
      config: the parts.
      seed: the order's seed.
      side: "train" or "heldout". Where a source has too few held-out scenes for a sentence, the held-out side
        does without it, and says so; the training side does with `allow_missing` alone.

    Raises:
      UserError: no parts, weights that sum to zero, a store that is missing or lacks a stream (all are
        reported together), too few scenes, stores of different tokenizers.
    """

    def __init__(self, config: MixtureConfig, seed: int, side: str = "train"):
        stores = {path: Store(path) for path in _paths(config)}
        self.stores = list(stores.values())
        _check_one_tokenizer(stores)
        kept = _with_streams(config, stores)
        if sum(part.weight for part in kept.values()) <= 0:
            raise UserError("config.data.sources: the weights sum to zero; at least one must be positive")
        self.sources: list[SourceSentences] = []
        short = []
        for number, (name, part) in enumerate(kept.items()):
            store = stores[part.store or config.store]
            mask = store.heldout(config.heldout_fraction)
            mask = mask if side == "heldout" else ~mask
            source = SourceSentences(name, part, store, mask, _seed(seed, number, side))
            if source.per_epoch:
                self.sources.append(source)
                continue
            short.append(
                f"config.data.sources.{name}: {source.num_scenes} {side} scenes in {store.path} have the streams "
                f"and frames for it, {part.recipe.num_scenes} are needed for a sentence"
            )
        if short and ((side == "train" and not config.allow_missing) or not self.sources):
            raise UserError("; ".join(short))
        for line in short:
            say(f"left out: {line}")
        kept = {source.name: kept[source.name] for source in self.sources}
        self._seed = _seed(seed, len(kept), side)
        total = sum(Fraction(part.weight) for part in kept.values())
        shares = np.cumsum([Fraction(part.weight) / total for part in kept.values()])
        self._bounds = [0] + [int(share * _SCALE) for share in shares[:-1]] + [_SCALE]

    def before(self, block: int) -> list[int]:
        """How many sentences of each source lie before `block`."""
        reached = [block * BLOCK * bound // _SCALE for bound in self._bounds]
        return [high - low for low, high in itertools.pairwise(reached)]

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a mixture lives as long as its process)
    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block's sentences: source ids int16 [BLOCK] and numbers within their source int64 [BLOCK]."""
        first, last = self.before(block), self.before(block + 1)
        counts = [after - before for before, after in zip(first, last, strict=True)]
        ids = np.repeat(np.arange(len(counts)), counts)
        ids = ids[np.random.default_rng([self._seed, block]).permutation(BLOCK)]
        numbers = np.zeros(BLOCK, np.int64)
        for source, start in enumerate(first):
            mine = ids == source
            numbers[mine] = start + np.arange(np.count_nonzero(mine))
        return ids.astype(np.int16), numbers


def _paths(config: MixtureConfig) -> list[str]:
    if not config.sources:
        raise UserError("config.data.sources: empty; name at least one source")
    for name, part in config.sources.items():
        if not (part.store or config.store):
            raise UserError(f"config.data.sources.{name}.store: no store given, nor config.data.store")
    return sorted({part.store or config.store for part in config.sources.values() if part.weight > 0})


def _check_one_tokenizer(stores: Mapping[str, Store]) -> None:
    headers = {path: store.manifest["tokenizer"] for path, store in stores.items()}
    identities = {path: (header["weights"], *header["grid"]) for path, header in headers.items()}
    if len(set(identities.values())) > 1:
        listed = ", ".join(
            f"{path}: {weights[:12]}, grid {h}×{w}" for path, (weights, h, w) in identities.items()
        )
        raise UserError(f"config.data: the stores hold codes of different tokenizers ({listed})")


def _with_streams(config: MixtureConfig, stores: Mapping[str, Store]) -> dict[str, SourceConfig]:
    kept, missing = {}, []
    for name, part in sorted(config.sources.items()):  # the order of names decides nothing
        if part.weight == 0:
            continue
        store = stores[part.store or config.store]
        if _usable(store, part.recipe).any():
            kept[name] = part
        else:
            wanted = ", ".join(part.recipe.streams)
            missing.append(
                f"{name} ({store.path} has no scene of ≥ {part.recipe.min_frames} frames of {wanted})"
            )
    if missing and (not config.allow_missing or not kept):
        raise UserError(f"config.data.sources: can't be made: {'; '.join(missing)}")
    if missing:
        say(f"left out of the mixture: {'; '.join(missing)}")
    return kept


def _usable(store: Store, recipe: Recipe) -> np.ndarray:
    sets = [set(recipe.streams) <= set(names) for names in store.stream_sets]
    return np.array(sets, bool)[store.index["stream_set"]] & (store.index["frames"] >= recipe.min_frames)


def _seed(seed: int, number: int, side: str) -> int:
    return int(np.random.SeedSequence([seed, number, side == "heldout"]).generate_state(1, np.uint64)[0] >> 1)
