"""Optimizers and learning-rate schedules, built from Optax."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.model.parametrization import ParameterScale
from lvm.model.transformer import ModelConfig

# Options that a choice ignores; they must stay at their defaults.
_UNUSED = {
    "lion": ("epsilon",),
    "adafactor": ("b1", "b2", "epsilon", "moment_dtype"),
    "cosine": ("decay_steps", "decay_tokens"),
    "constant": ("end_learning_rate", "decay_steps", "decay_tokens"),
}

_NOT_DECAYED = {"scale", "bias", "embedding", "codebook"}

# The stacked kernels of `lvm.model.transformer.Transformer` as matrices, batched over layers.
_IN = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3))  # [L, D, H, d]: D → H·d
_OUT = contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3)  # [L, H, d, D]: H·d → D
_MLP = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # [L, D, F], [L, F, D]
_MATRICES = {
    **{f"layers/attention/{name}": _IN for name in ("query", "key", "value")},
    "layers/attention/out": _OUT,
    **{f"layers/mlp/{name}": _MLP for name in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, and a learning-rate schedule with warm-up.

    Options that the chosen optimizer or schedule doesn't use must stay at their defaults: epsilon with lion; b1, b2,
    epsilon and moment_dtype with adafactor; end_learning_rate with constant; decay_steps and decay_tokens without wsd.

    Attributes:
      name: "adamw"; "lion" (published with b1 0.9, b2 0.99 and a learning rate 3 to 10 times lower); "adafactor",
        without momentum, with factored second moments; "muon", which orthogonalizes updates of the kernels of a
        transformer's layers (published with b1 0.95) and applies Nesterov AdamW to everything else. Under `fsdp` Muon
        gathers all layers' kernels of a kind at once, so a device must have memory for those.
      schedule: after the warm-up, "cosine" to `end_learning_rate`; "wsd": constant, then linear to
        `end_learning_rate`; or "constant". Both decays end with the run.
      learning_rate, end_learning_rate: absolute in every optimizer, not relative to a parameter's size.
      warmup_steps, warmup_tokens: length of the warm-up, in one of the two units; the other is 0.
      decay_steps, decay_tokens: length of wsd's decay, in one of the two units; the other is 0.
      b1: decay rate of the first moment, and of Muon's momentum; with lion, the weight of the momentum in an update.
      b2: decay rate of the second moment; with lion, of its momentum.
      epsilon: added to denominators.
      weight_decay: decoupled: every optimizer shrinks parameters by learning rate × weight decay a step.
      weight_decay_mask: "matrices" exempts norms, biases, embeddings and codebooks from decay; "all" exempts nothing.
      moment_dtype: storage of the first moment, "float32" or "bfloat16".
      clip_norm: global gradient norm above which gradients are scaled down; 0 turns clipping off.
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
        check_choice(self, "name", ("adamw", "lion", "adafactor", "muon"))
        check_choice(self, "schedule", ("cosine", "wsd", "constant"))
        check_choice(self, "weight_decay_mask", ("matrices", "all"))
        check_choice(self, "moment_dtype", ("float32", "bfloat16"))
        check_positive(self, "learning_rate", "epsilon")
        lengths = ("warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
        check_non_negative(self, "end_learning_rate", *lengths, "weight_decay", "clip_norm")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be in [0, 1)")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for choice in (self.name, self.schedule):
            for name in _UNUSED.get(choice, ()):
                if getattr(self, name) != defaults[name]:
                    raise UserError(
                        f"{name}={getattr(self, name)} has no effect with {choice}; leave it at {defaults[name]}"
                    )
        for phase in ("warmup", "decay"):
            steps, tokens = getattr(self, f"{phase}_steps"), getattr(self, f"{phase}_tokens")
            if steps and tokens:
                raise UserError(f"{phase}_tokens={tokens} and {phase}_steps={steps}; set one of them to 0")
        if self.schedule == "wsd" and not (self.decay_steps or self.decay_tokens):
            raise UserError("decay_steps=0; wsd needs decay_steps or decay_tokens")


def build(
    config: OptimizerConfig, total_steps: int, tokens_per_step: int = 0, model: ModelConfig | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer, and its schedule from step to learning rate.

    Args:
      tokens_per_step: converts lengths in tokens to steps, rounded up; 0 if the task has no tokens.
      model: the transformer, whose parametrization scales learning rates and epsilon; None for another network.

    Raises:
      UserError: warm-up and decay exceed the run, or are in tokens and the task has none; a parametrization for AdamW
        with another optimizer. The optimizer's `init`: Muon finds no kernels of a transformer's layers.
    """
    schedule = build_schedule(config, total_steps, tokens_per_step)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    scale_by_optimizer = _scale_by_optimizer(config)
    if model is not None and model.parametrization.name != "standard":
        if config.name != "adamw":
            raise UserError(
                f"config.optimizer.name={config.name}, but config.model.parametrization.name="
                f"{model.parametrization.name} scales learning rates of adamw; use adamw, or standard"
            )
        # Multipliers of the forward pass are folded into the parameters (`lvm.model.parametrization`): gradients and
        # updates are those of the published parameters. Adam divides by √v + epsilon, whose scale is the gradient's.
        scale = functools.partial(_scale_by_parameter, model.scales)
        clip.insert(0, scale(lambda parameter: parameter.multiplier))
        scale_by_optimizer = optax.chain(
            scale(lambda parameter: 1 / parameter.epsilon),
            scale_by_optimizer,
            scale(lambda parameter: parameter.multiplier * parameter.learning_rate),
        )
    # Weight decay and learning rate follow every optimizer in the same way, so they mean the same in each.
    mask = _decay_mask if config.weight_decay_mask == "matrices" else None
    step = optax.chain(
        scale_by_optimizer,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(*clip, step), schedule


def build_schedule(config: OptimizerConfig, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """The schedule from step to learning rate; arguments and errors as for `build`, without those of optimizers."""
    warmup, warmup_text = _length(config, "warmup", tokens_per_step)
    decay, decay_text = _length(config, "decay", tokens_per_step)
    if warmup >= total_steps:
        raise UserError(f"config.optimizer.{warmup_text} must be below total_steps={total_steps}")
    if warmup + decay > total_steps:
        raise UserError(f"config.optimizer.{decay_text} after {warmup_text} exceeds total_steps={total_steps}")
    peak, end = config.learning_rate, config.end_learning_rate
    start = 0.0 if warmup else peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, total_steps, end)
    constant = optax.warmup_constant_schedule(start, peak, warmup)
    if config.schedule == "constant":
        return constant
    return optax.join_schedules([constant, optax.linear_schedule(peak, end, decay)], [total_steps - decay])


def _length(config: OptimizerConfig, phase: str, tokens_per_step: int) -> tuple[int, str]:
    """The steps of a phase of the schedule, and the setting that they come from."""
    steps, tokens = getattr(config, f"{phase}_steps"), getattr(config, f"{phase}_tokens")
    if not tokens:
        return steps, f"{phase}_steps={steps}"
    if not tokens_per_step:
        raise UserError(f"config.optimizer.{phase}_tokens={tokens}, but the task has no tokens; use {phase}_steps")
    steps = -(-tokens // tokens_per_step)
    return steps, f"{phase}_tokens={tokens} ({steps} steps)"


def _scale_by_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates, before weight decay and learning rate."""
    b1, b2, epsilon, dtype = config.b1, config.b2, config.epsilon, config.moment_dtype
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2, mu_dtype=dtype)
    if config.name == "adafactor":
        # `optax.adafactor` would not multiply the decay by the learning rate. The two largest dimensions are factored,
        # if both are at least 64: of attention kernels [L, D, H, d] these are D and d, never the layers.
        return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=64), optax.clip_by_block_rms(1.0))
    if config.name == "muon":
        # The learning rate of −1 keeps the gradients' sign. An RMS of 0.2 is about that of AdamW's updates, so that
        # learning rate and decay carry over (Liu et al., arXiv 2502.16982).
        adam = {"adam_b1": b1, "adam_b2": b2, "eps": epsilon, "mu_dtype": dtype}
        return contrib.muon(-1.0, beta=b1, **adam, muon_weight_dimension_numbers=_dimension_numbers, consistent_rms=0.2)
    return optax.scale_by_adam(b1, b2, epsilon, mu_dtype=dtype)


def _scale_by_parameter(
    scales: Mapping[str, ParameterScale], factor: Callable[[ParameterScale], float]
) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the factor of its scale."""

    def scale(path: Any, update: jax.Array) -> jax.Array:
        return update * factor(scales[_name(path).removeprefix("layers/")])

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates))


def _dimension_numbers(params: Any) -> Any:
    numbers = jax.tree.map_with_path(lambda path, _: _MATRICES.get(_name(path)), params)
    if not jax.tree.leaves(numbers):
        raise UserError("config.optimizer.name=muon needs kernels of a transformer's layers, and this model has none")
    return numbers


def _decay_mask(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in _NOT_DECAYED, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
