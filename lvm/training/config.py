"""Configuration of a training run of the transformer."""

from __future__ import annotations

import dataclasses

from lvm.common.distributed import DistributedConfig
from lvm.common.validation import check_non_negative
from lvm.data.mixture.mixture import Mixture, MixtureConfig
from lvm.data.mixture.rows import Rows
from lvm.hardware.sharding import MeshConfig
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.loop import LoopConfig
from lvm.training.next_token import ObjectiveConfig
from lvm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A transformer's training.

    Attributes:
      seed: everything random follows from it and the step.
      batch_size: rows a step.
      heldout_batches: batches of held-out sentences that the held-out loss averages over.
      tokenizer: a tokenizer's folder, to show pictures of answers while training; "" shows none.
      accept_changed_mixture: goes on with a run whose mixture was another one until now.
      flags: compiler options over those of `lvm.hardware.compiler_options`, "name=value name=value"; "name=" removes
        one.
      deterministic: compiles to what gives the same bits at every run; on GPUs that costs speed.
      init_from: a model's folder, as `LVM.load` takes it, whose weights the training begins with; empty for random
        ones. It needs the same sizes and codes; a vocabulary of another size is resized.
    """

    seed: int = 0
    batch_size: int = 128
    heldout_batches: int = 4
    tokenizer: str = ""
    accept_changed_mixture: bool = False
    flags: str = ""
    deterministic: bool = False
    init_from: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")


def make_rows(config: TrainConfig, split: str = "train") -> Rows:
    """The rows that a configuration trains on."""
    mixture = Mixture(config.data, config.seed, split)
    vocabulary = Vocabulary.for_codes(mixture.stores[0].num_codes)
    return Rows(mixture, vocabulary, config.model.context, config.batch_size)
