"""The optimizers and their learning-rate schedules, all of them Optax's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from optax import contrib

from lvm.common.errors import UserError

_CHOICES = {
    "name": ("adamw", "lion", "adafactor", "muon"),
    "schedule": ("cosine", "wsd", "constant"),
    "weight_decay_mask": ("matrices", "all"),
    "moment_dtype": ("float32", "bfloat16"),
}

# What a choice has no use for; there a value other than the default is refused.
_UNUSED = {
    "lion": ("epsilon",),
    "adafactor": ("b1", "b2", "epsilon", "moment_dtype"),
    "cosine": ("decay_steps", "decay_tokens"),
    "constant": ("end_learning_rate", "decay_steps", "decay_tokens"),
}

_NOT_DECAYED = {"scale", "bias", "embedding", "codebook"}

# How the stacked kernels of `lvm.model.transformer.Transformer` are matrices; the layers are a batch of them.
_IN = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3))  # [L, D, H, d]: D → H·d
_OUT = contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3)  # [L, H, d, D]: H·d → D
_MLP = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # [L, D, F], [L, F, D]
_MATRICES = {
    "layers/attention/query": _IN,
    "layers/attention/key": _IN,
    "layers/attention/value": _IN,
    "layers/attention/out": _OUT,
    "layers/mlp/gate": _MLP,
    "layers/mlp/up": _MLP,
    "layers/mlp/down": _MLP,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, and a schedule that warms up to `learning_rate`.

    An option that the chosen optimizer or schedule has no use for must stay at its default: epsilon with lion; b1,
    b2, epsilon and moment_dtype with adafactor; end_learning_rate with constant; a decay's length without wsd.

    Attributes:
      name: "adamw"; "lion" (published with b1 0.9, b2 0.99 and a learning rate 3 to 10 times lower); "adafactor",
        without momentum, its second moments factored; "muon", which orthogonalises the kernels of a transformer's
        layers (published with b1 0.95) and takes Nesterov's AdamW for all else. Under `fsdp` it gathers all layers'
        kernels of a kind at once, so it is for models of which a device can hold that much.
      schedule: after the warm-up, "cosine" to `end_learning_rate`; "wsd": stable, then down a line to
        `end_learning_rate`; "constant". Both descents end with the run.
      learning_rate, end_learning_rate: absolute in every optimizer, not relative to a parameter's size.
      warmup_steps, warmup_tokens: the warm-up's length, given by one of the two; the other is 0.
      decay_steps, decay_tokens: the length of wsd's descent, given by one of the two; the other is 0.
      b1: decay rate of the first moment, for Muon's momentum too; with lion, the momentum's share in a step.
      b2: decay rate of the second moment; with lion, of its momentum.
      epsilon: added to denominators.
      weight_decay: decoupled: in every optimizer, learning rate × weight decay is the share lost a step.
      weight_decay_mask: "matrices" exempts norms, biases, embeddings and codebooks from decay; "all" exempts nothing.
      moment_dtype: how the first moment is stored, "float32" or "bfloat16".
      clip_norm: global gradient norm above which gradients are scaled down; 0 doesn't clip.
    """

    name: str = "adamw"
    schedule: str = "cosine"
    learning_rate: float = 1.5e-4
    end_learning_rate: float = 3e-5
    warmup_steps: int = 2000
    warmup_tokens: int = 0
    decay_steps: int = 0
    decay_tokens: int = 0
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    weight_decay_mask: str = "matrices"
    moment_dtype: str = "float32"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        lengths = ("warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
        for name in ("end_learning_rate", *lengths, "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        self._check_unused()
        self._check_lengths()

    def _check_unused(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for choice in (self.name, self.schedule):
            for name in _UNUSED.get(choice, ()):
                if getattr(self, name) != defaults[name]:
                    raise UserError(
                        f"{name}: {getattr(self, name)}, but {choice} has no use for it; "
                        f"leave it at {defaults[name]}"
                    )

    def _check_lengths(self) -> None:
        for part in ("warmup", "decay"):
            steps, tokens = getattr(self, f"{part}_steps"), getattr(self, f"{part}_tokens")
            if steps and tokens:
                raise UserError(
                    f"{part}_tokens: {tokens} beside {part}_steps {steps}; set the one that isn't meant to 0"
                )
        if self.schedule == "wsd" and not (self.decay_steps or self.decay_tokens):
            raise UserError("decay_steps: 0; wsd needs decay_steps or decay_tokens")


def build(
    config: OptimizerConfig, total_steps: int, tokens_per_step: int = 0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its schedule from step to learning rate.

    Its `init` raises a `UserError` where Muon finds no kernel of a transformer's layers.

    Args:
      config: which optimizer and schedule.
      total_steps: how long the run is.
      tokens_per_step: what turns lengths in tokens into steps, rounded up; 0 where nothing counts tokens.

    Raises:
      UserError: warm-up and descent are longer than the run, or in tokens where nothing counts tokens.
    """
    schedule = _schedule(config, total_steps, tokens_per_step)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    # Decay and learning rate come after every optimizer in the same way, so they mean the same in each.
    step = optax.chain(
        _direction(config),
        optax.add_decayed_weights(
            config.weight_decay, _decay_mask if config.weight_decay_mask == "matrices" else None
        ),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(*clip, step), schedule


def _schedule(config: OptimizerConfig, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    warmup, warmup_said = _length(config, "warmup", tokens_per_step)
    decay, decay_said = _length(config, "decay", tokens_per_step)
    if warmup >= total_steps:
        raise UserError(f"config.optimizer.{warmup_said} is not below total_steps {total_steps}")
    if warmup + decay > total_steps:
        raise UserError(
            f"config.optimizer.{decay_said} after {warmup_said} is longer than total_steps {total_steps}"
        )
    top, end = config.learning_rate, config.end_learning_rate
    start = 0.0 if warmup else top
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, top, warmup, total_steps, end)
    stable = optax.warmup_constant_schedule(start, top, warmup)
    if config.schedule == "constant":
        return stable
    return optax.join_schedules([stable, optax.linear_schedule(top, end, decay)], [total_steps - decay])


def _length(config: OptimizerConfig, part: str, tokens_per_step: int) -> tuple[int, str]:
    """The steps of a part of the schedule, and the key and the number that say so."""
    steps, tokens = getattr(config, f"{part}_steps"), getattr(config, f"{part}_tokens")
    if not tokens:
        return steps, f"{part}_steps: {steps}"
    if not tokens_per_step:
        raise UserError(
            f"config.optimizer.{part}_tokens: {tokens}, but this training counts no tokens; use {part}_steps"
        )
    steps = -(-tokens // tokens_per_step)
    return steps, f"{part}_tokens: {tokens} ({steps} steps)"


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to what the learning rate is multiplied with."""
    b1, b2, epsilon, dtype = config.b1, config.b2, config.epsilon, config.moment_dtype
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2, mu_dtype=dtype)
    if config.name == "adafactor":
        # Not `optax.adafactor`: it doesn't multiply the decay by the learning rate. The two largest dimensions are
        # factored, if both have 64: of attention kernels [L, D, H, d] these are D and d, and never the layers.
        return optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=64),
            optax.clip_by_block_rms(1.0),
        )
    if config.name == "muon":
        # The learning rate −1 leaves gradients their sign. An RMS of 0.2 is about that of AdamW's updates, so one
        # learning rate and one decay serve both (Liu et al., arXiv 2502.16982).
        return contrib.muon(
            learning_rate=-1.0,
            beta=b1,
            adam_b1=b1,
            adam_b2=b2,
            eps=epsilon,
            mu_dtype=dtype,
            muon_weight_dimension_numbers=_dimension_numbers,
            consistent_rms=0.2,
        )
    return optax.scale_by_adam(b1, b2, epsilon, mu_dtype=dtype)


def _dimension_numbers(params: Any) -> Any:
    numbers = jax.tree.map_with_path(
        lambda path, _: _MATRICES.get(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )
    if not jax.tree.leaves(numbers):
        raise UserError(
            "config.optimizer.name: 'muon' is for the kernels of a transformer's layers, and here are none"
        )
    return numbers


def _decay_mask(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in _NOT_DECAYED, params)
