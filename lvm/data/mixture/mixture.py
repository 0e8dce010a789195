"""Mixtures: the order of the sentences of all components, with random access.

Sentences come in blocks of `BLOCK`. Each block has every component in proportion to its weight, so the number of
sentences (and of tokens) before any block has a closed form: no sentence requires counting through those before it.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import weakref
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16, Int64

from lvm.common import files
from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.seeding import derive_seed
from lvm.common.validation import check_choice, check_tuples
from lvm.data.mixture.permutation import SHUFFLES
from lvm.data.mixture.recipe import Recipe
from lvm.data.mixture.sentences import ComponentConfig, ComponentSentences, usable_mask
from lvm.data.mixture.shares import SCALE, Shares
from lvm.data.mixture.split import check_fraction
from lvm.data.store import jsonl
from lvm.data.store.concat import AnyStore, ConcatStore, SingleStore
from lvm.data.store.jsonl import JsonlFormat, JsonlStore
from lvm.data.store.manifest import MANIFEST, all_same_codes, reference_tokenizer
from lvm.data.store.reader import Store

__all__ = ["BLOCK", "PERIOD", "ComponentConfig", "ComponentSentences", "Mixture", "MixtureConfig"]

BLOCK = 256
PERIOD = SCALE // BLOCK  # blocks after which the number of each component's sentences in a block repeats

ORDER = 3  # version of the rules by which (config, seed, n) determine the n-th sentence
PACKINGS = ("concat", "whole")
LOSSES = ("all", "answers")
_UNITS = ("sentences", "codes")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Components of a mixture, and how their sentences become rows.

    Attributes:
      components: by name.
      store: the scene stores of components that name none.
      heldout_fraction: share of the groups that training never sees.
      allow_missing: log and skip components whose store is missing or lacks their streams or scenes, instead of
        failing; weights are then relative to the remaining ones.
      weigh_by: the unit of weights, "sentences" or "codes". (The paper's are shares of tokens, so of codes.)
      packing: "concat" cuts one stream of all sentences into rows; "whole" packs whole sentences into rows.
      loss: on "all" tokens, or only on the codes of each recipe's "answers".
      shuffle: "all" mixes a component's scenes over its whole store; "blocks" keeps neighbors together, for storage
        with slow random reads (`lvm.data.mixture.permutation.permute_pages`).
      jsonl: the format of stores that are JSONL files.
      stage_to: a local folder that shards are copied to, and verified, on first read; "" reads grids where they lie.
      skip_damaged: replace a sentence with a damaged block by PAD without loss, log and count it, instead of
        failing. The order of the other sentences doesn't change.
    """

    components: dict[str, ComponentConfig] = dataclasses.field(default_factory=dict)
    store: tuple[str, ...] = ()
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
            check_choice(self, name, allowed)
        check_tuples(self, "store")
        check_fraction(self.heldout_fraction)

    def stores_of(self, component: ComponentConfig) -> tuple[str, ...]:
        """The paths of a component's stores."""
        return component.store or self.store

    def code_weight(self, component: ComponentConfig) -> float:
        """A component's weight relative to the others, in codes whichever unit `weigh_by` is."""
        return component.weight * (1 if self.weigh_by == "codes" else component.recipe.num_grids)


class Mixture:
    """All sentences of the training or held-out split, in their final order.

    Args:
      config: of the mixture.
      seed: of the order.
      split: "train" or "heldout". The held-out split skips, and logs, a component with too few held-out scenes for a
        sentence; the training split does so only with `allow_missing`.

    Attributes:
      components: those present, sorted by name.
      stores: all open stores.
      shares: float64 [components], of the sentences.
      seed: of the order within blocks.

    Raises:
      UserError: no components, weights that sum to zero, missing stores, streams or scenes (all are reported
        together), stores of different tokenizers.
    """

    def __init__(self, config: MixtureConfig, seed: int, split: str = "train"):
        if not config.components:
            raise UserError("config.data.components: empty; name at least one component")
        # Sorted: the order of keys in the configuration must not change the order of data.
        configs = {name: c for name, c in sorted(config.components.items()) if c.weight > 0}
        if not configs:
            raise UserError("config.data.components: the weights sum to zero; at least one must be positive")
        stores, missing = _open_stores(config, configs)
        self.stores = list(stores.values())
        _check_one_tokenizer(stores)
        of_component = {
            name: _concat([stores[path] for path in config.stores_of(component)])
            for name, component in configs.items()
            if name not in missing
        }
        for name, store in of_component.items():
            if reason := _check_scenes(configs[name], store):
                missing[name] = reason
        present = [name for name in configs if name not in missing]
        components = [
            ComponentSentences(
                name,
                configs[name],
                of_component[name],
                config.heldout_fraction,
                split,
                _seed(seed, index, split),
                config.shuffle,
            )
            for index, name in enumerate(present)
        ]
        self.components = [c for c in components if c.sentences_per_epoch]
        skipped = missing | {c.name: c.shortage() for c in components if not c.sentences_per_epoch}
        fatal = missing if split == "heldout" and self.components else skipped
        if fatal and not (config.allow_missing and self.components):
            names_of = collections.defaultdict(list)
            for name, reason in sorted(fatal.items()):
                names_of[reason].append(name)
            reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in names_of.items())
            raise UserError(f"config.data.components: missing: {reasons}")
        for name, reason in sorted(skipped.items()):
            log_info(f"skipped component {name} ({reason})")
        self.config, self._base_seed = config, seed
        self.seed = _seed(seed, len(self.components), split)
        self._shares = _shares(config.weigh_by, self.components)
        self.shares = np.array(self._shares.weights) / SCALE

    def sentences_before(self, block: int) -> list[int]:
        """The number of sentences of each component before `block`."""
        return self._shares.counts(block * BLOCK)

    def block_counts(self, first: int, last: int) -> Int64[np.ndarray, "blocks components"]:
        """The number of sentences of each component in each of the blocks [first, last)."""
        counts = self._shares.counts(np.arange(first, last + 1, dtype=np.uint64) * BLOCK)
        return np.diff(np.stack(counts, axis=1).astype(np.int64), axis=0)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a mixture lives as long as its process)
    def block(self, block: int) -> tuple[Int16[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The component ids of a block's sentences, and their indices within their components; n = `BLOCK`."""
        first, last = self.sentences_before(block), self.sentences_before(block + 1)
        counts = [after - before for before, after in zip(first, last, strict=True)]
        ids = np.repeat(np.arange(len(counts)), counts)
        ids = ids[np.random.default_rng([self.seed, block]).permutation(BLOCK)]
        indices = np.zeros(BLOCK, np.int64)
        for component, start in enumerate(first):
            mask = ids == component
            indices[mask] = start + np.arange(np.count_nonzero(mask))
        return ids.astype(np.int16), indices

    def record(self) -> dict[str, Any]:
        """Everything that determines the order of sentences and the loss, as JSON; a run keeps it on resume."""
        components = {
            component.name: {
                "recipe": _recipe_record(component.recipe),
                "share": float(share),
                "sentences": component.sentences_per_epoch,
                "store": component.store.identity(),
            }
            for component, share in zip(self.components, self.shares, strict=True)
        }
        fields = {f: getattr(self.config, f) for f in ("heldout_fraction", "packing", "loss", "shuffle")}
        return {"order": ORDER, "seed": self._base_seed, **fields, "components": components}

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """The identity of the tokenizer of the stores' codes; decoders of others may differ."""
        return reference_tokenizer(store.manifest["tokenizer"] for store in self.stores)

    def identity(self) -> str:
        """A hash of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def _recipe_record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON; omits same_class=False, which earlier versions lacked, so that their runs resume."""
    record: dict[str, Any] = to_json(recipe)
    if not record.get("same_class", True):
        del record["same_class"]
    return record


def _open_stores(
    config: MixtureConfig, configs: Mapping[str, ComponentConfig]
) -> tuple[dict[str, SingleStore], dict[str, str]]:
    """Opens the components' stores. Returns them by path, and by component the reason why one can't be opened."""
    stores: dict[str, SingleStore] = {}
    missing = {}
    for name, component in configs.items():
        paths = config.stores_of(component)
        if absent := [path for path in paths if path not in stores and not files.exists(path)]:
            missing[name] = f"{', '.join(absent)} doesn't exist; tokenizer.encode writes a store"
        elif not paths:
            missing[name] = "no store: set config.data.components.NAME.store or config.data.store"
        elif repeated := [path for path, count in collections.Counter(paths).items() if count > 1]:
            raise UserError(f"config.data: {', '.join(repeated)} is named twice as store of {name}; name it once")
        else:
            for path in paths:
                if path not in stores:
                    is_jsonl = path.endswith(jsonl.SUFFIX)
                    stores[path] = JsonlStore(path, config.jsonl) if is_jsonl else _open_store(path, config.stage_to)
    return dict(sorted(stores.items())), missing


_open: weakref.WeakValueDictionary[tuple[str, str, str], Store] = weakref.WeakValueDictionary()


def _open_store(path: str, stage_to: str) -> Store:
    """Opens a store once for all mixtures of this process, while any of them is in use."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        key = path, stage_to, hashlib.sha256(files.read_bytes(epath.Path(path) / MANIFEST)).hexdigest()
        store = _open.get(key)
        if store is None:
            store = _open[key] = Store(path, stage_to)
        return store
    return Store(path, stage_to)  # raises


def _concat(stores: list[SingleStore]) -> AnyStore:
    return stores[0] if len(stores) == 1 else ConcatStore(stores)


def _check_one_tokenizer(stores: Mapping[str, SingleStore]) -> None:
    headers = {path: store.manifest["tokenizer"] for path, store in stores.items()}
    shapes = {(*header["grid"], header["num_codes"]) for header in headers.values()}
    known = [header for header in headers.values() if header["hash"]]  # unknown for a JSONL file
    if len(shapes) > 1 or not all_same_codes(known):
        listed = ", ".join(
            f"{path}: {header['hash'][:12] or 'unknown'}, grid {header['grid'][0]}×{header['grid'][1]}, "
            f"{header['num_codes']} codes"
            for path, header in headers.items()
        )
        raise UserError(f"config.data: the stores hold codes of different tokenizers ({listed})")


def _check_scenes(component: ComponentConfig, store: AnyStore) -> str:
    """The reason why no scene of the store suits the component's recipe, or ""."""
    recipe = component.recipe
    summaries = store.indexes if store.kinds is None else [store.kinds]
    if any(usable_mask(store, recipe, entries).any() for entries in summaries):
        return ""
    with_class = " with a class" if recipe.same_class else ""
    streams = ", ".join(recipe.streams)
    return f"{store.path} has no scene{with_class} of ≥ {recipe.min_frames} frames of {streams}"


def _shares(weigh_by: str, components: list[ComponentSentences]) -> Shares:
    """The components' shares of the sentences."""
    sizes = [component.recipe.num_grids if weigh_by == "codes" else 1 for component in components]
    weights = [Fraction(c.config.weight) / size for c, size in zip(components, sizes, strict=True)]
    shares = Shares(weights)
    for component, weight in zip(components, shares.weights, strict=True):
        if not weight:
            raise UserError(
                f"config.data.components.{component.name}.weight={component.config.weight:g} is less than 1/{SCALE} "
                "of all; use 0 to disable the component"
            )
    return shares


def _seed(seed: int, index: int, split: str) -> int:
    return derive_seed(seed, index, split == "heldout") >> 1
