"""Tokenizer of configs/tasks_lvm.py: 48×48 images to 6×6 codes of a codebook of 1024, on two CPU cores."""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.config import TokenizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig


def get_config() -> ConfigDict:
    model = VQGANConfig(
        resolution=48,
        patch_size=8,
        channels=64,
        channel_multipliers=(1,),
        encoder_blocks=1,
        decoder_blocks=3,
        middle_blocks=0,
        codebook_size=1024,
        codebook_dim=8,
        norm_groups=8,
        block_bias=False,
        latent_kernel=1,
        quant_convs=False,
    )
    return to_config_dict(
        TokenizerConfig(
            batch_size=8,
            model=model,
            preprocess=Preprocess(48),
            data=ImagesConfig(
                "configs/tasks_tokenizer_scenes.py",
                heldout_fraction=0.15,
                rgb_share=0.4,
                max_scenes=600,
                crop=None,
                cache_gigabytes=1.0,
            ),
            loss=LossConfig(l1=0.25, l2=20.0, gradient=0.2, autoencoder_steps=384),
            optimizer=OptimizerConfig(
                learning_rate=6e-3, end_learning_rate=3e-5, warmup_steps=50, b2=0.99, weight_decay=0.0
            ),
            loop=LoopConfig(
                total_steps=4800, log_every=100, evaluate_every=1600, picture_every=1600, checkpoint_every=400
            ),
        )
    )
