"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from lvm.errors import UserError

_NOT_DECAYED = {"scale", "bias", "embedding", "codebook"}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and a cosine from `learning_rate` to `end_learning_rate`.

    Attributes:
      clip_norm: global gradient norm above which gradients are scaled down; 0 doesn't clip.
      weight_decay: decoupled; norms, biases, embeddings and codebooks aren't decayed.
    """

    learning_rate: float = 1.5e-4
    end_learning_rate: float = 3e-5
    warmup_steps: int = 2000
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("end_learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not in [0, 1)")


def build(config: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its schedule from step to learning rate.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    if config.warmup_steps >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps: {config.warmup_steps} is not below total_steps {total_steps}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.end_learning_rate,
    )
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, adamw), schedule


def _decayed(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in _NOT_DECAYED, params)
