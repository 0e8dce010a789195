"""Configuration of `lvm evaluate`."""

import dataclasses

from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive, check_tuples
from lvm.data.mixture.mixture import MixtureConfig
from lvm.evaluation.evaluator import Evaluator
from lvm.hardware.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Files of LPIPS (`tokenizer.perceptual.lpips`); without them figures have no LPIPS.

    Attributes:
      weights: torchvision's VGG16.
      heads: the linear heads of the lpips package.
    """

    weights: str = ""
    heads: str = ""

    def __bool__(self) -> bool:
        return bool(self.weights or self.heads)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation.

    Attributes:
      evaluations: evaluators by name.
      source: a folder of images or an image source's config file, required by evaluations of images. Of the model's
        training source, the held-out scenes are evaluated.
      derived: streams that are computed from rgb (`lvm.data.streams.derived`), such as "gray" for colorization,
        if the source lacks them.
      unseen: declares that training saw no image of `source`, so that all its scenes are evaluated.
      max_scenes: upper limit on held-out scenes.
      data: the mixture of training, for models that don't record their own, such as published ones.
      seed: of sentences, queries and sampling.
      batch_size: images of a call of the tokenizer and prompts of a call of the model.
      lpips: where LPIPS's weights are.
      mesh: the devices that the model is sharded over.
    """

    evaluations: dict[str, Evaluator] = dataclasses.field(default_factory=dict)
    source: str = ""
    derived: tuple[str, ...] = ()
    unseen: bool = False
    max_scenes: int = 256
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    seed: int = 0
    batch_size: int = 64
    lpips: LPIPSConfig = dataclasses.field(default_factory=LPIPSConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_positive(self, "max_scenes", "batch_size")
        check_non_negative(self, "seed")
        check_tuples(self, "derived")
        if not self.evaluations:
            raise UserError("evaluations={} must name at least one evaluation")
        with_images = [name for name, evaluator in self.evaluations.items() if evaluator.needs_images]
        if with_images and not self.source:
            raise UserError(
                f"source='' must be a folder of images or an image source's config file, for {', '.join(with_images)}"
            )
        if self.derived and not self.source:
            raise UserError(f"derived={self.derived} needs a source")
