"""Configuration of tokenizer training."""

import dataclasses

from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.images.preprocess import Preprocess
from lvm.hardware.sharding import MeshConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A training run of a tokenizer.

    Attributes:
      preprocess: converts pictures to images of the model's resolution.
      init_from: folder of a tokenizer (see `Tokenizer.load`) with the initial weights and codebook; empty for random
        ones. It needs the same model and preprocess, and loss.autoencoder_steps=0.
    """

    seed: int = 0  # determines, with the step, everything random
    batch_size: int = 256  # images per step
    model: VQGANConfig = dataclasses.field(default_factory=VQGANConfig)
    preprocess: Preprocess = dataclasses.field(default_factory=lambda: Preprocess(256))
    init_from: str = ""
    data: ImagesConfig = dataclasses.field(default_factory=ImagesConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")
        check_positive(self, "batch_size")
        preprocessed, resolution = self.preprocess.resolution, self.model.resolution
        if preprocessed != resolution:
            raise UserError(f"preprocess.resolution={preprocessed} must equal model.resolution={resolution}")
        for axis in ("sequence", "tensor"):
            if (size := getattr(self.mesh, axis)) != 1:
                raise UserError(f"mesh.{axis}={size} must be 1: a tokenizer is sharded over data and fsdp only")
        if self.init_from and (steps := self.loss.autoencoder_steps):
            raise UserError(f"loss.autoencoder_steps={steps} must be 0 with init_from, which has a codebook")
