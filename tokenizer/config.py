"""Configuration of a tokenizer's training."""

from __future__ import annotations

import dataclasses

from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.hardware.sharding import MeshConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer's training.

    Attributes:
      seed: everything random follows from it and the step.
      batch_size: images a step.
      preprocess: how pictures become images; its resolution is the model's.
      init_from: a tokenizer's folder, as `Tokenizer.load` takes it, whose weights and codebook the training begins
        with; empty for random ones. It needs the same model and preprocess, and loss.autoencoder_steps 0.
    """

    seed: int = 0
    batch_size: int = 256
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
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")
        if self.preprocess.resolution != self.model.resolution:
            raise UserError(
                f"preprocess.resolution: {self.preprocess.resolution}, model.resolution is {self.model.resolution}; "
                "they must agree"
            )
        for axis in ("sequence", "tensor"):
            if getattr(self.mesh, axis) != 1:
                raise UserError(
                    f"mesh.{axis}: {getattr(self.mesh, axis)}; a tokenizer is split over data and fsdp alone"
                )
        if self.init_from and self.loss.autoencoder_steps:
            raise UserError(
                f"loss.autoencoder_steps: {self.loss.autoencoder_steps}, expected 0: init_from brings a codebook"
            )
