"""Training that starts from the weights of a model folder in any format."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.store.manifest import same_codes
from lvm.interop import models
from lvm.interop.lazy_checkpoint import LazyCheckpoint, resize_vocabulary, with_dtype
from lvm.interop.tensors import LazyTensor
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.task import State

# Fields that weights depend on; context, compute dtype and others may differ.
_ARCHITECTURE = (
    "hidden_size", "mlp_size", "num_layers", "num_heads", "kv_heads", "rope_theta", "norm_epsilon", "tie_embeddings",
)  # fmt: skip


def load_initial_model(
    folder: epath.PathLike, config: ModelConfig, vocabulary: Vocabulary, tokenizer: Mapping[str, Any]
) -> LazyCheckpoint:
    """Opens a model in float32, its vocabulary resized to the training's.

    `config`, `vocabulary` and `tokenizer` (the identity of the codes' tokenizer) are those of the training. Raises
    UserError if `folder` is not a model, or has another architecture, number of codes or tokenizer.
    """
    checkpoint = models.read(folder)
    different = [
        f"config.model.{name}={getattr(config, name)!r}, checkpoint: {getattr(checkpoint.config, name)!r}"
        for name in _ARCHITECTURE
        if getattr(config, name) != getattr(checkpoint.config, name)
    ]
    if checkpoint.vocabulary.num_codes != vocabulary.num_codes:
        different.append(f"{vocabulary.num_codes} codes, checkpoint: {checkpoint.vocabulary.num_codes}")
    if different:
        raise UserError(f"config.init_from={folder}: another architecture: {'; '.join(different)}")
    trained_with = checkpoint.record["tokenizer"]
    if trained_with and not same_codes(trained_with, tokenizer):
        raise UserError(f"config.init_from={folder}: trained on codes of another tokenizer than the store's")
    if checkpoint.vocabulary != vocabulary:
        log_info(f"{folder}: vocabulary changes from {checkpoint.vocabulary} to {vocabulary}")
    return with_dtype(resize_vocabulary(checkpoint, vocabulary.size), "float32")


def load_weights(checkpoint: LazyCheckpoint, state: State) -> State:
    """Replaces the parameters of a fresh state by a checkpoint's."""
    return state | {"params": jax.tree.map(_replace, state["params"], checkpoint.tree())}


def _replace(old: jax.Array, tensor: LazyTensor) -> jax.Array:
    """Loads a tensor with the sharding of an array, whose memory is freed first."""
    sharding = old.sharding
    old.delete()
    array = tensor.read()
    # Copies: the state is donated, and devices that hold the same shard must not share its memory.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))
