"""Configuration of an evaluation."""

import dataclasses

from lvm.common.validation import check_positive
from lvm.data.mixture.mixture import MixtureConfig
from lvm.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation.

    Attributes:
      source: a folder of images or an image source's config file; required. Of the model's training source, the
        held-out scenes are evaluated.
      unseen: declares that training saw no image of `source`, so that all its scenes are evaluated.
      max_scenes: upper limit on held-out scenes.
      num_sentences: sentences per component of the mixture, for likelihoods.
      num_queries: queries per task.
      shots: example pairs per query.
      data: the mixture to evaluate for models that don't record their own, such as published ones.
      temperature, top_k, top_p: see `SamplingParams`.
      seed: of sentences, queries and sampling.
    """

    source: str = ""
    unseen: bool = False
    max_scenes: int = 256
    num_sentences: int = 128
    num_queries: int = 128
    shots: int = 2
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "max_scenes", "num_sentences", "num_queries", "shots")
        SamplingParams(self.temperature, self.top_k, self.top_p)  # checks them
