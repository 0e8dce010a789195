"""MaskGIT's tokenizer (arXiv 2202.04200): images of 256×256 as 16×16 of 1024 codes of 256 dimensions.

The network as published (`VARIANTS["maskgit"]`), whose weights load from its checkpoint (docs/interop.md). Its recipe:
L2, logits of ResNet-50 × 0.1, a StyleGAN-like discriminator (non-saturating × 0.1, R1 × 10), commitment 0.25, entropy
0.1, Adam 1e-4 with (0, 0.99), averages of 0.999. Theirs has rFID 2.28 on ImageNet, after 1M steps of 256 images.
Besides, gradients of both networks are clipped at norm 1, this package's default (`clip_norm`).

54,515,587 parameters, 256,000,000 images.
Hardware: 8 GPUs of 80 GB or a v5e-32; `lvm plan` on yours.
Expected time: 392.5 TFLOP a step; 1.6 days on 8 H100 at 35 % of their peak.
Measured step time, MFU and rFID: not measured.

Needs `--config.data.source` and `--config.loss.perceptual.weights` (docs/tokenizer.md).
"""

import dataclasses

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.adversary import AdversarialConfig
from tokenizer.config import TokenizerConfig
from tokenizer.images import ImagesConfig
from tokenizer.network import VARIANTS
from tokenizer.objective import LossConfig
from tokenizer.perceptual.resnet import ResNet50
from tokenizer.quantizers.vq import VQ

_ADAM = OptimizerConfig(
    schedule="cosine", learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=5000, b1=0.0, b2=0.99, weight_decay=0.0
)


def get_config() -> ConfigDict:
    quantizer = VQ(learning="gradient", dead_below=0.0, entropy=0.1)
    model = dataclasses.replace(VARIANTS["maskgit"], quantizer=quantizer, compute_dtype="bfloat16")
    return to_config_dict(
        TokenizerConfig(
            batch_size=256,
            model=model,
            preprocess=Preprocess(256, "center_crop"),
            ema_decay=0.999,
            data=ImagesConfig(heldout_fraction=0.001, rgb_share=1.0),
            loss=LossConfig(l1=0.0, l2=1.0, gradient=0.0, perceptual=ResNet50(weight=0.1), autoencoder_steps=0),
            adversarial=AdversarialConfig(
                weight=0.1, start_step=20_000, objective="non_saturating", r1=10.0, optimizer=_ADAM
            ),
            optimizer=_ADAM,
            loop=LoopConfig(
                total_steps=1_000_000,
                checkpoint_every=5000,
                picture_every=10_000,
                evaluate_every=10_000,
                input_workers=16,
            ),
        )
    )
