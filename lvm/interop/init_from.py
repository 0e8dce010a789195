"""Training that begins with a stored model's weights, whatever folder they are in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.interop import models
from lvm.interop.lazy_checkpoint import LazyCheckpoint, resize_vocabulary, with_dtype
from lvm.interop.tensors import LazyTensor
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.step import Step
from lvm.training.task import State

# What a model is; context, compute type and the like may be others than it was trained with.
_SAME = (
    "hidden_size",
    "mlp_size",
    "num_layers",
    "num_heads",
    "kv_heads",
    "rope_theta",
    "norm_epsilon",
    "tie_embeddings",
)


def load_initial_model(
    folder: epath.PathLike, config: ModelConfig, vocabulary: Vocabulary, tokenizer: Mapping[str, Any]
) -> LazyCheckpoint:
    """The model in a folder, float32, with as many ids as the training's vocabulary.

    Args:
      folder: of any kind that `lvm.interop.models` reads.
      config: the training's.
      vocabulary: the training's.
      tokenizer: the identity of the tokenizer that made the training's codes.

    Raises:
      UserError: not such a folder, another model, or one of other codes.
    """
    found = models.read(folder)
    different = [
        f"config.model.{name}: {getattr(config, name)!r}, there {getattr(found.config, name)!r}"
        for name in _SAME
        if getattr(config, name) != getattr(found.config, name)
    ]
    if found.vocabulary.num_codes != vocabulary.num_codes:
        different.append(f"codes: {vocabulary.num_codes}, there {found.vocabulary.num_codes}")
    if different:
        raise UserError(f"config.init_from: {folder}: another model ({'; '.join(different)})")
    known = found.record["tokenizer"]
    if known and known["hash"] != tokenizer.get("hash"):
        raise UserError(f"config.init_from: {folder}: a model of another tokenizer's codes than the store's")
    if found.vocabulary != vocabulary:
        log_info(f"{folder}: its vocabulary becomes ours: {found.vocabulary} → {vocabulary}")
    return with_dtype(resize_vocabulary(found, vocabulary.size), "float32")


class WarmStartStep(Step):
    """A step whose first state has a stored model's weights; its optimizer's state is a fresh one."""

    def __init__(self, model: LazyCheckpoint, *arguments: Any):
        super().__init__(*arguments)
        self._model = model

    def init(self) -> State:
        """See `Step.init`."""
        state = super().init()
        return state | {"params": _placed(self._model.tree(), state["params"])}


def _placed(tree: Any, like: Any) -> Any:
    """Tensors where others lie, which they replace one after the other."""
    if not isinstance(tree, LazyTensor):
        return {key: _placed(tree[key], like.pop(key)) for key in tuple(like)}
    sharding = like.sharding
    like.delete()
    array = tree.read()
    # Copies: the state is donated, and devices that hold the same part must not share its memory.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))
