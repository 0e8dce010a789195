"""Tokenizer for photos on two CPU cores: crops of 64×64 as 8×8 of 1024 codes, with an adversary and no downloads.

The parts of configs/tokenizer_f16_8192.py at a small size: a codebook of moving averages, a discriminator with LeCam,
averaged weights; instead of a perceptual network, multi-scale SSIM. The adversary's weight follows the ratio of
gradients (`adaptive`). Chosen after eight short trials, most of which left a grid (docs/log.md, 2026-12-01). Needs
`--config.data.source`. 50 minutes on two cores beside other work; results are in docs/tokenizer.md, "On photos".
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import RandomCrop
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.adversary import AdversarialConfig
from tokenizer.config import TokenizerConfig
from tokenizer.discriminators.patchgan import PatchGAN
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig
from tokenizer.perceptual.base import MultiScaleSSIM


def get_config() -> ConfigDict:
    model = VQGANConfig(
        resolution=64,
        patch_size=2,
        channels=32,
        channel_multipliers=(1, 2, 4),
        encoder_blocks=1,
        decoder_blocks=2,
        middle_blocks=1,
        codebook_size=1024,
        codebook_dim=16,
        norm_groups=16,
        quant_convs=False,
    )
    return to_config_dict(
        TokenizerConfig(
            batch_size=16,
            model=model,
            preprocess=Preprocess(64, "center_crop"),
            ema_decay=0.995,
            data=ImagesConfig(crop=RandomCrop(scale=(0.2, 1.0))),
            loss=LossConfig(l1=1.0, l2=4.0, gradient=0.0, perceptual=MultiScaleSSIM(weight=0.3), autoencoder_steps=300),
            adversarial=AdversarialConfig(
                weight=0.3,
                adaptive=True,
                start_step=2500,
                lecam=0.001,
                discriminator=PatchGAN(channels=32, layers=2),
                optimizer=OptimizerConfig(
                    learning_rate=5e-4, end_learning_rate=5e-5, warmup_steps=50, b1=0.5, b2=0.99, weight_decay=0.0
                ),
            ),
            optimizer=OptimizerConfig(
                learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=200, b2=0.99, weight_decay=0.0
            ),
            loop=LoopConfig(
                total_steps=5500, log_every=50, evaluate_every=500, picture_every=500, checkpoint_every=500
            ),
        )
    )
