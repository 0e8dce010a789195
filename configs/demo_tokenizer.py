"""Tokenizer of the demo: 64×64 images to 8×8 codes of a codebook of 512, on two CPU cores."""

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
        resolution=64,
        patch_size=8,
        channels=64,
        channel_multipliers=(1,),
        encoder_blocks=1,
        decoder_blocks=3,
        middle_blocks=0,
        codebook_size=512,
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
            preprocess=Preprocess(64),
            data=ImagesConfig(
                "configs/demo_scenes.py",
                heldout_fraction=0.15,
                rgb_share=0.5,
                max_scenes=600,
                crop=None,
                cache_gigabytes=0.5,
            ),
            loss=LossConfig(l1=0.25, l2=20.0, gradient=0.2, autoencoder_steps=384),
            optimizer=OptimizerConfig(
                learning_rate=6e-3, end_learning_rate=3e-5, warmup_steps=50, b2=0.99, weight_decay=0.0
            ),
            loop=LoopConfig(
                total_steps=3200, log_every=100, evaluate_every=800, picture_every=1600, checkpoint_every=400
            ),
        )
    )
