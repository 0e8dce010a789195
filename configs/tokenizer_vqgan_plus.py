"""VQGAN+ of 12 bits (MaskBit, arXiv 2409.16211): images of 256×256 as 16×16 of 4096 codes, a plain lookup codebook.

As published: L2 × 4, logits of ResNet-50 × 0.1, a blur-pool discriminator (hinge × 0.02 from step 20,000, LeCam 0.001),
AdamW 1e-4 with a warm-up of 5000 steps and cosine, weight decay 1e-4, clipping at 1, crops of at least 80 %. Their rFID
on ImageNet is 1.39, after 1.35M steps of 256 images. Ours may differ in the discriminator's details.

55,203,523 parameters, 345,600,000 images.
Hardware: 8 GPUs of 80 GB or a v5e-32; `lvm plan` on yours.
Expected time: 336.4 TFLOP a step; 1.9 days on 8 H100 at 35 % of their peak.
Measured step time, MFU and rFID: not measured.

Needs `--config.data.source` and `--config.loss.perceptual.weights` (docs/tokenizer.md).
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.adversary import AdversarialConfig
from tokenizer.config import TokenizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig
from tokenizer.perceptual.resnet import ResNet50
from tokenizer.quantizers.vq import VQ

_ADAMW = OptimizerConfig(
    learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=5000, b2=0.999, weight_decay=1e-4, clip_norm=1.0
)


def training(model: VQGANConfig) -> TokenizerConfig:
    """The recipe for a network."""
    return TokenizerConfig(
        batch_size=256,
        model=model,
        preprocess=Preprocess(model.resolution, "center_crop"),
        ema_decay=0.999,
        data=ImagesConfig(heldout_fraction=0.001, rgb_share=1.0),
        loss=LossConfig(l1=0.0, l2=4.0, gradient=0.0, perceptual=ResNet50(weight=0.1), autoencoder_steps=0),
        adversarial=AdversarialConfig(weight=0.02, start_step=20_000, lecam=0.001, optimizer=_ADAMW),
        optimizer=_ADAMW,
        loop=LoopConfig(total_steps=1_350_000, checkpoint_every=5000, picture_every=10_000, evaluate_every=10_000,
                        input_workers=16),
    )  # fmt: skip


def get_config() -> ConfigDict:
    """The published network: as much width at every stage, and no convolutions around the quantizer."""
    model = VQGANConfig(
        channel_multipliers=(1, 1, 2, 2, 4), decoder_blocks=2, codebook_size=4096, quant_convs=False,
        quantizer=VQ(learning="gradient", dead_below=0.0), compute_dtype="bfloat16",
    )  # fmt: skip
    return to_config_dict(training(model))
