"""Configuration of a training run of the transformer."""

import dataclasses

from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative
from lvm.data.mixture.mixture import Mixture, MixtureConfig
from lvm.data.mixture.rows import Rows
from lvm.hardware.sharding import MeshConfig
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.evaluator import EvaluatorConfig
from lvm.training.loop import LoopConfig
from lvm.training.next_token import ObjectiveConfig
from lvm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run of the transformer.

    Attributes:
      seed: everything random follows from it and the step.
      batch_size: rows per step.
      heldout_batches: batches of held-out sentences that the held-out loss averages over.
      tokenizer: a tokenizer's folder, to render pictures of answers during training and for `evaluations`; "" for none.
      evaluations: evaluators by name, each with its own interval (docs/training.md).
      evaluation_source: the folder or config file of the images that the stores were encoded from; evaluations take the
        held-out scenes of it. Without one only those that need no images can run, on the stores' held-out sentences.
      accept_changed_mixture: resumes a run although its mixture has changed.
      compiler_options: overrides of `lvm.hardware.compiler_options`, "name=value name=value"; "name=" removes one.
      deterministic: compiles to programs with the same bits at every run, which is slower on GPUs.
      init_from: a model's folder, as `LVM.load` takes it, to start from its weights; "" for random ones. Its sizes and
        codes must be the same; a vocabulary of another size is resized.
      branch_from: a run's workdir and a step that it keeps, "WORKDIR@STEP", to start from its whole state and to go on
        with its data, such as to decay the learning rate; "" starts at step 0. Model, data, batch and optimizer must be
        the same; learning rate, schedule and length may differ.
    """

    seed: int = 0
    batch_size: int = 128
    heldout_batches: int = 4
    tokenizer: str = ""
    accept_changed_mixture: bool = False
    compiler_options: str = ""
    deterministic: bool = False
    init_from: str = ""
    branch_from: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    evaluations: dict[str, EvaluatorConfig] = dataclasses.field(default_factory=dict)
    evaluation_source: str = ""

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")
        if self.branch_from and self.init_from:
            raise UserError(f"branch_from={self.branch_from} and init_from={self.init_from}; set one of them")
        if self.branch_from and self.branch is None:
            raise UserError(f"branch_from={self.branch_from} must be WORKDIR@STEP")

    @property
    def branch(self) -> tuple[str, int] | None:
        """Workdir and step of `branch_from`."""
        workdir, _, step = self.branch_from.rpartition("@")
        return (workdir, int(step)) if workdir and step.isdecimal() else None


def make_rows(config: TrainConfig, split: str = "train") -> Rows:
    """The rows that a configuration trains on."""
    mixture = Mixture(config.data, config.seed, split)
    vocabulary = Vocabulary.for_codes(mixture.stores[0].num_codes)
    return Rows(mixture, vocabulary, config.model.context, config.batch_size)
