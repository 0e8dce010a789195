"""The demo's tokenizer: 64×64 images to 64 codes of 512, on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from lvm.config import to_config_dict
from lvm.data.preprocess import Preprocess
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.objective import LossConfig
from tokenizer.train import TokenizerConfig
from tokenizer.vqgan import VQGANConfig


def get_config() -> ConfigDict:
    model = VQGANConfig(
        resolution=64,
        patch_size=4,
        channels=32,
        channel_multipliers=(1, 2),
        encoder_blocks=1,
        decoder_blocks=2,
        middle_blocks=1,
        codebook_size=512,
        codebook_dim=8,
        norm_groups=8,
        l2_normalize=True,
    )
    return to_config_dict(
        TokenizerConfig(
            batch_size=16,
            model=model,
            preprocess=Preprocess(64),
            data=ImagesConfig("configs/demo_scenes.py", heldout_fraction=0.15, max_scenes=600),
            loss=LossConfig(),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, end_learning_rate=3e-5, warmup_steps=100, b2=0.99, weight_decay=0.0
            ),
            loop=LoopConfig(
                total_steps=5000, log_every=100, evaluate_every=1000, picture_every=2500, checkpoint_every=500
            ),
        )
    )
