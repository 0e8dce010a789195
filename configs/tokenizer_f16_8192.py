"""Our default: images of 256×256 as 16×16 of 8192 codes of 64 dimensions, by the recipe of VQGAN+.

A codebook that follows its latents by moving averages, with a reset of dead codes, after 10,000 steps as an
autoencoder; everything else as in configs/tokenizer_vqgan_plus.py. The network is exported to diffusers' `VQModel`.

63,149,379 parameters, 345,600,000 images.
Hardware: 8 GPUs of 80 GB or a v5e-32; `lvm plan` on yours.
Expected time: 384.7 TFLOP a step; 2.2 days on 8 H100 at 35 % of their peak.
Measured step time, MFU and rFID: not measured.

Needs `--config.data.source` and `--config.loss.perceptual.weights` (docs/tokenizer.md). Without weights of ResNet-50:
`--config.loss.perceptual.kind=ms_ssim --config.adversarial.feature_matching=1` in a config of your own.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import tokenizer_vqgan_plus
from lvm.common.config import to_config_dict
from tokenizer.network import VQGANConfig
from tokenizer.quantizers.vq import VQ


def get_config() -> ConfigDict:
    model = VQGANConfig(
        channel_multipliers=(1, 1, 2, 2, 4), quantizer=VQ(ema_decay=0.99, dead_below=0.05), compute_dtype="bfloat16"
    )
    config = tokenizer_vqgan_plus.training(model)
    return to_config_dict(dataclasses.replace(config, loss=dataclasses.replace(config.loss, autoencoder_steps=10_000)))
