"""Hyperparameters by rule: batch size, learning rate and Adam's b2 from a model's size and its number of tokens."""

import dataclasses
import math
from collections.abc import Callable

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive

_MAX_LEARNING_RATE, _MIN_BATCH = 0.01, 8  # of the square-root-batch rule


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Rule for hyperparameters. A point's own batch size and learning rate replace those of the rule.

    Attributes:
      name: "fixed": the training config's; "step_law" (Li et al., arXiv 2503.04715); "square_root_batch": Marin's, with
        a learning rate of 0.33·√rows / width.
      target_steps: of "square_root_batch", whose batch is the power of two that comes nearest to them.
      warmup_fraction, decay_fraction: of all steps; the decay is that of a WSD schedule.
      end_fraction: final learning rate relative to the peak.
    """

    name: str = "fixed"
    target_steps: int = 2**16
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.2
    end_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_choice(self, "name", RULES)
        check_positive(self, "target_steps", "decay_fraction")
        check_non_negative(self, "warmup_fraction", "end_fraction")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise UserError(f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} exceed 1")


@dataclasses.dataclass(frozen=True)
class Case:
    """Values that rules depend on.

    Attributes:
      width: hidden size.
      params: without embedding and output projection.
      tokens: of the whole training.
      context: tokens a row.
      rows_unit: rows that the mesh divides; batch sizes are multiples of it.
      batch_size, learning_rate: a point's own; 0 for those of the rule.
      base_batch_size, base_learning_rate: of the training config.
    """

    width: int
    params: int
    tokens: float
    context: int
    rows_unit: int
    batch_size: int
    learning_rate: float
    base_batch_size: int
    base_learning_rate: float


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Choice of a rule; `batch_size` in rows. `b2` is None where the training config's is kept."""

    batch_size: int
    learning_rate: float
    b2: float | None = None
    warnings: tuple[str, ...] = ()


def fixed(case: Case, config: RuleConfig) -> Hyperparameters:
    """The training config's values."""
    return Hyperparameters(case.batch_size or case.base_batch_size, case.learning_rate or case.base_learning_rate)


def step_law(case: Case, config: RuleConfig) -> Hyperparameters:
    """Learning rate 1.797·N^−0.7129·D^0.3075, batch of 0.5807·D^0.5709 tokens (Li et al., arXiv 2503.04715).

    N excludes embedding and output projection. Fitted on 60M to 1B parameters and 2B to 100B tokens.
    """
    rows = 0.5807 * case.tokens**0.5709 / case.context
    batch_size = case.batch_size or max(1, round(rows / case.rows_unit)) * case.rows_unit
    learning_rate = case.learning_rate or 1.797 * case.params**-0.7129 * case.tokens**0.3075
    warnings = []
    if not 6e7 <= case.params <= 1.1e9:
        warnings.append(f"step_law: {case.params:.3g} parameters, fitted on 6e7 to 1.1e9")
    if not 2e9 <= case.tokens <= 1e11:
        warnings.append(f"step_law: {case.tokens:.3g} tokens, fitted on 2e9 to 1e11")
    if not case.batch_size and not 0.5 <= batch_size / rows <= 2:
        warnings.append(f"step_law: {batch_size} rows, the rule's are {rows:.3g}; the mesh takes {case.rows_unit}")
    return Hyperparameters(batch_size, learning_rate, warnings=tuple(warnings))


def square_root_batch(case: Case, config: RuleConfig) -> Hyperparameters:
    """Learning rate 0.33·√B / width and b2 = 0.98^(B/128) with B rows, as in Marin's sweeps.

    The batch is halved until the learning rate is at most 0.01.

    Raises:
      UserError: that needs fewer than 8 rows, or the point's own learning rate is higher.
    """
    exact = case.tokens / case.context / config.target_steps
    batch_size = case.batch_size or max(_MIN_BATCH, case.rows_unit, 2 ** round(math.log2(exact)))
    while not case.batch_size and _square_root(batch_size, case.width) > _MAX_LEARNING_RATE:
        if batch_size // 2 < max(_MIN_BATCH, case.rows_unit):
            break
        batch_size //= 2
    learning_rate = case.learning_rate or _square_root(batch_size, case.width)
    if learning_rate > _MAX_LEARNING_RATE:
        raise UserError(
            f"square_root_batch: learning_rate={learning_rate:.3g} with {batch_size} rows and width {case.width} is "
            f"above {_MAX_LEARNING_RATE}; use a larger width or fewer rows"
        )
    if batch_size < _MIN_BATCH:
        raise UserError(f"square_root_batch: batch_size={batch_size} must be at least {_MIN_BATCH}")
    return Hyperparameters(batch_size, learning_rate, 0.98 ** (batch_size / 128))


def _square_root(batch_size: int, width: int) -> float:
    return 0.33 * math.sqrt(batch_size) / width


RULES: dict[str, Callable[[Case, RuleConfig], Hyperparameters]] = {
    "fixed": fixed,
    "step_law": step_law,
    "square_root_batch": square_root_batch,
}
