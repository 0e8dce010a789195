"""The tokenizer released with LVM (arXiv 2312.00785): images of 256×256, squashed, as 16×16 of 8192 codes of 64 dims.

The network as published (`VARIANTS["lvm"]`, that of amused-256), whose weights load from its folder (docs/interop.md).
Its training isn't published; this is the recipe of configs/tokenizer_vqgan_plus.py. To adapt its decoder to other
images: `--config.init_from=FOLDER --config.train=decoder --config.loop.total_steps=50000`.

146,244,675 parameters, 345,600,000 images.
Hardware: 8 GPUs of 80 GB or a v5e-32; `lvm plan` on yours.
Expected time: 621.4 TFLOP a step; 3.5 days on 8 H100 at 35 % of their peak.
Measured step time, MFU and rFID: not measured.

Needs `--config.data.source` and `--config.loss.perceptual.weights` (docs/tokenizer.md).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import tokenizer_vqgan_plus
from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from tokenizer.network import VARIANTS


def get_config() -> ConfigDict:
    config = tokenizer_vqgan_plus.training(dataclasses.replace(VARIANTS["lvm"], compute_dtype="bfloat16"))
    return to_config_dict(dataclasses.replace(config, preprocess=Preprocess(256, "squash", icc="ignore")))
