"""Tokenizer of configs/tasks_lvm.py: 48×48 images as 6×6 codes of 1024, on two CPU cores.

As the demo's but for its width, quantizer, MS-SSIM, learning rate and steps.
"""

from ml_collections import ConfigDict

from configs import demo_tokenizer
from lvm.common.config import to_config_dict
from tokenizer.perceptual.base import MultiScaleSSIM
from tokenizer.quantizers.fsq import FSQ


def get_config() -> ConfigDict:
    """FSQ, since a quarter of the codes of a learned codebook were black, as annotations mostly are (docs/log.md)."""
    config = demo_tokenizer.get_config()
    del config.model["quantizer"]
    config.model.quantizer = to_config_dict(FSQ(levels=(4, 4, 4, 4, 4)))
    config.model.update(resolution=48, channels=128, norm_groups=16, codebook_size=1024, codebook_dim=5)
    config.preprocess.resolution = 48
    config.data.update(source="configs/tasks_tokenizer_scenes.py", rgb_share=0.5, cache_gigabytes=1.0)
    config.optimizer.learning_rate = 4e-3
    del config.loss["perceptual"]
    config.loss.perceptual = to_config_dict(MultiScaleSSIM(weight=1.0))
    config.loop.update(total_steps=8000, evaluate_every=2000)
    return config
