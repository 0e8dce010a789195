"""Configuration of tokenizer training."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.data.images.preprocess import Preprocess
from lvm.hardware.sharding import MeshConfig
from lvm.training import optimizer
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.adversary import AdversarialConfig, Adversary
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig, TokenizerTask


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A training run of a tokenizer.

    Attributes:
      preprocess: converts pictures to images of the model's resolution.
      ema_decay: of the weights' moving averages (`TokenizerTask`), which are evaluated and exported; 0 for none.
      train: "all", or "decoder" to adapt the decoder of `init_from` and keep its codes.
      init_from: folder of a tokenizer (see `Tokenizer.load`) with the initial weights and codebook; empty for random
        ones. It needs the same model and preprocess, and loss.autoencoder_steps=0.
    """

    seed: int = 0  # determines, with the step, everything random
    batch_size: int = 256  # images per step
    model: VQGANConfig = dataclasses.field(default_factory=VQGANConfig)
    preprocess: Preprocess = dataclasses.field(default_factory=lambda: Preprocess(256))
    init_from: str = ""
    train: str = "all"
    ema_decay: float = 0.0
    data: ImagesConfig = dataclasses.field(default_factory=ImagesConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_non_negative(self, "seed")
        check_positive(self, "batch_size")
        check_choice(self, "train", ("all", "decoder"))
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be in [0, 1)")
        if self.train == "decoder" and not self.init_from:
            raise UserError("train='decoder' needs init_from, the tokenizer whose codes are kept")
        preprocessed, resolution = self.preprocess.resolution, self.model.resolution
        if preprocessed != resolution:
            raise UserError(f"preprocess.resolution={preprocessed} must equal model.resolution={resolution}")
        perceptual = self.loss.perceptual
        if resolution < perceptual.min_resolution:
            raise UserError(
                f"model.resolution={resolution} must be at least {perceptual.min_resolution} for "
                f"loss.perceptual.kind={perceptual.kind!r}"
            )
        for axis in ("sequence", "tensor"):
            if (size := getattr(self.mesh, axis)) != 1:
                raise UserError(f"mesh.{axis}={size} must be 1: a tokenizer is sharded over data and fsdp only")
        if self.init_from and (steps := self.loss.autoencoder_steps):
            raise UserError(f"loss.autoencoder_steps={steps} must be 0 with init_from, which has a codebook")


def build_task(
    config: TokenizerConfig, total_steps: int, heldout: Mapping[str, UInt8[np.ndarray, "_ R R 3"]] | None = None
) -> TokenizerTask:
    """The task that a run trains; `heldout` images of each stream are for its metrics and pictures.

    Raises:
      UserError: the adversarial settings don't fit the rest (`AdversarialConfig.check`).
    """
    config.adversarial.check(config.batch_size, config.model.resolution, total_steps)
    tx, schedule = optimizer.build(config.optimizer, total_steps)
    adversary = None
    if config.adversarial.weight:
        adversary = Adversary(config.adversarial, config.model.compute_dtype, total_steps)
    return TokenizerTask(
        config.model, config.loss, tx, schedule,
        batch_size=config.batch_size, has_codebook=bool(config.init_from), heldout=heldout, adversary=adversary,
        ema_decay=config.ema_decay, train=config.train,
    )  # fmt: skip
