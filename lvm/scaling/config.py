"""Configuration of a sweep."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.model.flops import CONVENTIONS
from lvm.scaling.rules import RuleConfig
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.space import Space


@dataclasses.dataclass(frozen=True)
class Point:
    """A run to plan: a shape and one of budget, tokens and tokens_per_param. The sweep's rules choose what is 0.

    Attributes:
      width: hidden size.
      budget: FLOPs of the training.
      tokens: trained on.
      tokens_per_param: tokens for each parameter, embedding and output projection included.
      batch_size: rows a step.
      branch: branches off the run of the most tokens among those that differ in tokens alone, from its checkpoint
        before the decay of a WSD schedule.
      overrides: key of the training configuration → value, as on the command line.
    """

    width: int
    num_layers: int = 0
    num_heads: int = 0
    mlp_size: int = 0
    budget: float = 0.0
    tokens: float = 0.0
    tokens_per_param: float = 0.0
    batch_size: int = 0
    learning_rate: float = 0.0
    branch: bool = False
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(self, "width")
        names = ("budget", "tokens", "tokens_per_param")
        check_non_negative(self, "num_layers", "num_heads", "mlp_size", *names, "batch_size", "learning_rate")
        if sum(getattr(self, name) > 0 for name in names) != 1:
            values = ", ".join(f"{name}={getattr(self, name):g}" for name in names)
            raise UserError(f"{values}: set one of them, and the others to 0")


def make_points(space: Space) -> tuple[Point, ...]:
    """Points of a space; keys that are no field of a point are overrides.

    Raises:
      UserError: an impossible value.
    """
    fields = {field.name for field in dataclasses.fields(Point)} - {"overrides"}

    def make_point(values: Mapping[str, Any]) -> Point:
        if "width" not in values:
            raise UserError(f"{dict(values)}: a point needs width, its hidden size")
        overrides = {key: str(value) for key, value in values.items() if key not in fields}
        return Point(**{key: value for key, value in values.items() if key in fields}, overrides=overrides)

    return tuple(map(make_point, space))


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep: points to train at, and the rules that make runs of them.

    Attributes:
      train: config file of the training; runs override its shape, batch, learning rate and length.
      points: see `make_points`.
      shape, rule: how shapes follow from widths, and hyperparameters from shapes and lengths.
      flops_convention: of `lvm.model.flops`.
      flops_tolerance: relative difference of a run's FLOPs from its budget above which the plan is refused.
      tokens_per_param: expected at the minimum of a budget's losses, embedding and output projection included, to check
        that it lies inside of the budget's sizes.
      unique_tokens: tokens of the training split; 0 counts those of the stores, which must be there.
      max_epochs: repetitions of the data above which the plan is refused. Up to about 4 cost little loss
        (arXiv 2305.16264).
      num_codes: codebook size of the tokenizer.
      accelerator: of each run, as `lvm plan` takes it, for mesh, micro-batches and price; "" leaves the mesh alone.
      mfu: assumed for the price, relative to the accelerator's peak.
      device_flops: FLOP/s that a device achieves; 0 is mfu × peak, or no price without an accelerator.
      evaluation: arguments of `lvm evaluate` for every finished run, besides --model and --out; () evaluates none.
    """

    train: str = ""
    points: tuple[Point, ...] = ()
    shape: ShapeConfig = dataclasses.field(default_factory=ShapeConfig)
    rule: RuleConfig = dataclasses.field(default_factory=RuleConfig)
    flops_convention: str = "causal"
    flops_tolerance: float = 0.01
    tokens_per_param: float = 20.0
    unique_tokens: float = 0.0
    max_epochs: float = 4.0
    num_codes: int = 8192
    accelerator: str = ""
    mfu: float = 0.4
    device_flops: float = 0.0
    evaluation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self, "flops_convention", CONVENTIONS)
        check_positive(self, "flops_tolerance", "tokens_per_param", "max_epochs", "num_codes", "mfu")
        check_non_negative(self, "unique_tokens", "device_flops")
        if not self.train:
            raise UserError("train='' must be a config file of lvm train")
        if not self.points:
            raise UserError("points=() must have at least one point")
