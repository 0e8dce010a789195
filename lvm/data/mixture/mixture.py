"""Mixtures: which sentence comes n-th, by random access.

Sentences come in blocks of `BLOCK`. Each block holds every component in proportion to its weight, so the number
of sentences (and of tokens) before any block has a closed form: the n-th sentence is found without counting
through those before it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.seeding import derive_seed
from lvm.data.mixture.permutation import SHUFFLES
from lvm.data.mixture.sentences import AnyStore, ComponentConfig, ComponentSentences, usable
from lvm.data.mixture.split import check_fraction
from lvm.data.store import jsonl
from lvm.data.store.jsonl import JsonlFormat, JsonlStore
from lvm.data.store.reader import Store

__all__ = ["BLOCK", "PERIOD", "ComponentConfig", "ComponentSentences", "Mixture", "MixtureConfig"]

BLOCK = 256
_SCALE = 2**32  # cumulative weights are integers over this, so that sums are exact
PERIOD = _SCALE // BLOCK  # blocks after which the number of each component's sentences in a block repeats

ORDER = 2  # version of the rules by which (config, seed, n) tell the n-th sentence
PACKINGS = ("concat", "whole")
LOSSES = ("all", "answers")
_UNITS = ("sentences", "codes")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Where sentences come from, and how they become rows.

    Attributes:
      components: name → part.
      store: the scene store of the parts that name none.
      heldout_fraction: share of the groups that training never sees.
      allow_missing: leave out parts whose store isn't there or lacks their streams or scenes, and say so,
        instead of failing; the weights of the others are then shares of what is left.
      weigh_by: what weights are shares of, "sentences" or "codes". (The paper's are of tokens, so of codes.)
      packing: "concat" cuts one stream of all sentences into rows; "whole" puts whole sentences into them.
      loss: what is learned, "all" tokens or the codes of the "answers" of each recipe alone.
      shuffle: "all" mixes a component's scenes over all of its store; "blocks" takes neighbours together, for
        storage where random reads are slow (`lvm.data.mixture.permutation.permute_pages`).
      jsonl: what stores that are JSONL files don't tell.
      stage_to: a local folder that shards are copied to, checked, when they are first read; needed for stores on
        gs://.
      skip_damaged: a sentence with an image whose record is damaged becomes PAD that bears no loss, is said and
        counted, instead of ending the run. Which sentences come when doesn't change.
    """

    components: dict[str, ComponentConfig] = dataclasses.field(default_factory=dict)
    store: str = ""
    heldout_fraction: float = 0.05
    allow_missing: bool = False
    weigh_by: str = "sentences"
    packing: str = "concat"
    loss: str = "all"
    shuffle: str = "all"
    jsonl: JsonlFormat = dataclasses.field(default_factory=JsonlFormat)
    stage_to: str = ""
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        choices = {"weigh_by": _UNITS, "packing": PACKINGS, "loss": LOSSES, "shuffle": SHUFFLES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        check_fraction(self.heldout_fraction)


class Mixture:
    """All sentences of a training or held-out split, in their final order.

    Args:
      config: the parts.
      seed: the order's seed.
      split: "train" or "heldout". Where a component has too few held-out scenes for a sentence, the held-out split
        does without it, and says so; the training split does with `allow_missing` alone.

    Attributes:
      components: the parts that are there, in the order of their names.
      stores: theirs.
      shares: float64 [components], of the sentences.
      seed: of the order within blocks.

    Raises:
      UserError: no parts, weights that sum to zero, stores that are missing or lack a stream or scenes (all are
        reported together), stores of different tokenizers.
    """

    def __init__(self, config: MixtureConfig, seed: int, split: str = "train"):
        if not config.components:
            raise UserError("config.data.components: empty; name at least one component")
        # The order of names decides nothing.
        parts = {name: part for name, part in sorted(config.components.items()) if part.weight > 0}
        if not parts:
            raise UserError("config.data.components: the weights sum to zero; at least one must be positive")
        stores, missing = _open_stores(config, parts)
        self.stores = list(stores.values())
        _check_one_tokenizer(stores)
        present = {name: part for name, part in parts.items() if name not in missing}
        missing |= _without_streams(config, present, stores)
        made = [
            ComponentSentences(
                name,
                part,
                stores[part.store or config.store],
                config.heldout_fraction,
                split,
                _seed(seed, number, split),
                config.shuffle,
            )
            for number, (name, part) in enumerate(
                (name, part) for name, part in parts.items() if name not in missing
            )
        ]
        short = {
            component.name: component.shortage() for component in made if not component.sentences_per_epoch
        }
        self.components = [component for component in made if component.sentences_per_epoch]
        refused = missing if split == "heldout" and self.components else missing | short
        _report(refused, missing | short, may_miss=config.allow_missing and bool(self.components))
        self.config, self._given_seed = config, seed
        self.seed = _seed(seed, len(self.components), split)
        self._bounds = _bounds(config.weigh_by, self.components)
        self.shares = np.diff(self._bounds) / _SCALE

    def sentences_before(self, block: int) -> list[int]:
        """How many sentences of each component lie before `block`."""
        reached = [block * BLOCK * bound // _SCALE for bound in self._bounds]
        return [high - low for low, high in itertools.pairwise(reached)]

    def block_counts(self, first: int, last: int) -> np.ndarray:
        """How many sentences of each component lie in each of the blocks [first, last): int64 [blocks, components]."""
        # Below PERIOD nothing overflows, and counts repeat after it.
        edges = np.arange(first, last + 1, dtype=np.uint64)[:, None] * np.uint64(BLOCK)
        if last > PERIOD:
            raise ValueError(f"blocks from {first} to {last} go beyond the period of {PERIOD}")
        shares = np.array(
            [bound % _SCALE for bound in self._bounds], np.uint64
        )  # the last is all: it wraps to 0
        reached = (edges * shares) >> np.uint64(32)
        reached[:, -1] = edges[:, 0]
        return np.diff(np.diff(reached.astype(np.int64), axis=1), axis=0)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a mixture lives as long as its process)
    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block's sentences: component ids int16 [BLOCK] and numbers within their component int64 [BLOCK]."""
        first, last = self.sentences_before(block), self.sentences_before(block + 1)
        counts = [after - before for before, after in zip(first, last, strict=True)]
        ids = np.repeat(np.arange(len(counts)), counts)
        ids = ids[np.random.default_rng([self.seed, block]).permutation(BLOCK)]
        numbers = np.zeros(BLOCK, np.int64)
        for component, start in enumerate(first):
            mine = ids == component
            numbers[mine] = start + np.arange(np.count_nonzero(mine))
        return ids.astype(np.int16), numbers

    def record(self) -> dict[str, Any]:
        """All that decides which sentence comes n-th and how it is learned, as JSON: what a run must keep."""
        components = {
            component.name: {
                "recipe": to_json(component.recipe),
                "share": float(share),
                "sentences": component.sentences_per_epoch,
                "store": component.store.identity(),
            }
            for component, share in zip(self.components, self.shares, strict=True)
        }
        fields = ("heldout_fraction", "packing", "loss", "shuffle")
        chosen = {name: getattr(self.config, name) for name in fields}
        return {"order": ORDER, "seed": self._given_seed, **chosen, "components": components}

    def identity(self) -> str:
        """A hash of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def _open_stores(
    config: MixtureConfig, parts: Mapping[str, ComponentConfig]
) -> tuple[dict[str, AnyStore], dict[str, str]]:
    """The stores that are there, by path, and what is wrong with the parts whose isn't."""
    stores: dict[str, AnyStore] = {}
    missing = {}
    for name, part in parts.items():
        path = part.store or config.store
        if not path:
            missing[name] = f"no store given: set config.data.components.{name}.store or config.data.store"
        elif not epath.Path(path).exists():
            missing[name] = f"{path} doesn't exist; tokenizer.encode writes a store"
        elif path not in stores:
            is_jsonl = path.endswith(jsonl.SUFFIX)
            stores[path] = JsonlStore(path, config.jsonl) if is_jsonl else Store(path, config.stage_to)
    return dict(sorted(stores.items())), missing


def _check_one_tokenizer(stores: Mapping[str, AnyStore]) -> None:
    headers = {path: store.manifest["tokenizer"] for path, store in stores.items()}
    kinds = {(*header["grid"], header["num_codes"]) for header in headers.values()}
    weights = {header["hash"] for header in headers.values()} - {""}  # a JSONL file doesn't tell them
    if len(kinds) > 1 or len(weights) > 1:
        listed = ", ".join(
            f"{path}: {header['hash'][:12] or 'unknown'}, grid {header['grid'][0]}×{header['grid'][1]}, "
            f"{header['num_codes']} codes"
            for path, header in headers.items()
        )
        raise UserError(f"config.data: the stores hold codes of different tokenizers ({listed})")


def _without_streams(
    config: MixtureConfig, parts: Mapping[str, ComponentConfig], stores: Mapping[str, AnyStore]
) -> dict[str, str]:
    """What is wrong with the parts whose store has not one scene for them."""
    missing = {}
    for name, part in parts.items():
        store, recipe = stores[part.store or config.store], part.recipe
        if not any(usable(store, recipe, entries).any() for entries in store.indexes):
            labelled = " with a class" if recipe.same_class else ""
            missing[name] = (
                f"{store.path} has no scene{labelled} of ≥ {recipe.min_frames} frames of {', '.join(recipe.streams)}"
            )
    return missing


def _report(refused: Mapping[str, str], left_out: Mapping[str, str], may_miss: bool) -> None:
    if refused and not may_miss:
        listed = "; ".join(f"{name} ({reason})" for name, reason in sorted(refused.items()))
        raise UserError(f"config.data.components: can't be made: {listed}")
    for name, reason in sorted(left_out.items()):
        log_info(f"left out of the mixture: {name} ({reason})")


def _bounds(weigh_by: str, components: list[ComponentSentences]) -> list[int]:
    """Cumulative shares of the sentences, over `_SCALE`: [0, …, _SCALE]."""
    grids = [component.recipe.num_grids if weigh_by == "codes" else 1 for component in components]
    weights = [
        Fraction(component.config.weight) / size for component, size in zip(components, grids, strict=True)
    ]
    bounds = [0] + [int(part / sum(weights) * _SCALE) for part in itertools.accumulate(weights)]
    for component, low, high in zip(components, bounds[:-1], bounds[1:], strict=True):
        if low == high:
            raise UserError(
                f"config.data.components.{component.name}.weight: {component.config.weight:g} is under 1/{_SCALE} of "
                "all; 0 leaves the component out"
            )
    return bounds


def _seed(seed: int, number: int, split: str) -> int:
    return derive_seed(seed, number, split == "heldout") >> 1
