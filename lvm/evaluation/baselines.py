"""Baselines of prompted tasks: answers that take no model."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Integer

from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs
from lvm.data.store.reader import MANIFEST, Store
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context

_MAX_NEIGHBORS = 4000  # training frames that the nearest is searched in


def copied_example(queries: Sequence[Query], target: str) -> Images:
    """The last example's answer."""
    return np.stack([scene.image(frame, target) for scene, frame in (query.examples[-1] for query in queries)])


def copied_query(queries: Sequence[Query], stream: str) -> Images:
    """The query itself."""
    return np.stack([query.scene.image(query.frame, stream) for query in queries])


def mean_image(queries: Sequence[Query], target: str, same_original: bool = False) -> Images:
    """The mean of all queries' true answers but those of the query's own original, or scene: none sees its answer."""
    truth = np.stack([query.scene.image(query.frame, target) for query in queries]).astype(np.float64)
    groups = np.array([query.scene.info.key if same_original else query.group for query in queries])
    total, means = truth.sum(0), {}
    for group in np.unique(groups):
        mask = groups == group
        others = np.count_nonzero(~mask)
        means[group] = (total - truth[mask].sum(0)) / others if others else np.full(truth.shape[1:], 127.5)
    return np.stack([np.rint(means[group]) for group in groups]).astype(np.uint8)


def nearest_neighbor(context: Context, queries: Sequence[Query], source: str, target: str) -> Images | None:
    """The answer of the training frame with the most codes equal to the query's, at equal positions, decoded.

    None if no training store with both streams is found.
    """
    pool = training_pairs(context, source, target)
    if pool is None:
        return None
    inputs, targets = pool
    grids = [query.scene.grid(query.frame, source) for query in queries]
    nearest = [int(np.count_nonzero(inputs == grid, axis=1).argmax()) for grid in grids]
    return context.tokenizer.decode(targets[nearest].astype(np.int32))


def training_pairs(
    context: Context, source: str, target: str
) -> tuple[Integer[np.ndarray, "M N"], Integer[np.ndarray, "M N"]] | None:
    """Codes of two streams of up to `_MAX_NEIGHBORS` training frames of different scenes."""
    stores = [s for s in training_stores(context) if any({source, target} <= set(names) for names in s.stream_sets)]
    if not stores:
        return None
    pairs = ComponentConfig(Pairs(source, target, shots=1), store=tuple(str(store.path) for store in stores))
    config = MixtureConfig({"pairs": pairs}, heldout_fraction=context.mixture.heldout_fraction)
    (component,) = Mixture(config, context.seed).components
    codes = component.sentences(np.arange(min(_MAX_NEIGHBORS, component.sentences_per_epoch)))  # [M, 2, N]
    return codes[:, 0], codes[:, 1]


def training_stores(context: Context, paths: Sequence[str] | None = None) -> list[Store]:
    """The stores that the model was trained on, as far as they are there, of `paths` or of the whole mixture.

    Relative paths begin in the folder that training was started in; a store may have been moved with its project.
    """
    record, mixture = context.model.record, context.mixture
    if paths is None:
        paths = sorted({path for component in mixture.components.values() for path in mixture.stores_of(component)})
    stores = []
    for path in paths:
        candidates = (path, os.path.join(record.get("folder", ""), path))
        existing = next((p for p in candidates if (epath.Path(p) / MANIFEST).exists()), None)
        if existing and (store := Store(existing)).identity() in record["stores"]:
            stores.append(store)
    return stores
