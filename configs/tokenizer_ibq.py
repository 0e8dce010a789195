"""IBQ with 8192 codes of 256 dimensions (arXiv 2412.02692): images of 256×256 as 16×16 codes.

As published: L1, LPIPS, a PatchGAN from the first step (hinge × 0.04, LeCam 0.05), entropy 0.05 at temperature 0.01,
commitment 0.25, Adam 1e-4. Theirs has rFID 1.87 on ImageNet and uses 98 % of its codes, after 280 epochs whose rate
drops at epoch 250, here the decay of `wsd`. Their attention at 16×16 is left out, which this package's network lacks.
Besides, gradients of both networks are clipped at norm 1, this package's default (`clip_norm`).

89,641,347 parameters, 358,720,000 images.
Hardware: 8 GPUs of 80 GB or a v5e-32; `lvm plan` on yours.
Expected time: 490.5 TFLOP a step; 2.9 days on 8 H100 at 35 % of their peak.
Measured step time, MFU and rFID: not measured.

Needs `--config.data.source` and `--config.loss.perceptual.{weights,heads}` (docs/tokenizer.md).
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from tokenizer.adversary import AdversarialConfig
from tokenizer.config import TokenizerConfig
from tokenizer.discriminators.patchgan import PatchGAN
from tokenizer.images import ImagesConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig
from tokenizer.perceptual.lpips import LPIPS
from tokenizer.quantizers.ibq import IBQ

_STEPS = 1_401_250  # 280 epochs of 1,281,167 images in batches of 256
_ADAM = OptimizerConfig(
    schedule="wsd", learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=5000, decay_steps=150_000, b1=0.5, b2=0.9,
    weight_decay=0.0,
)  # fmt: skip


def get_config() -> ConfigDict:
    model = VQGANConfig(
        channel_multipliers=(1, 1, 2, 2, 4), encoder_blocks=4, decoder_blocks=4, codebook_dim=256,
        quantizer=IBQ(quantization=0.0, commitment=0.25, codebook=1.0), compute_dtype="bfloat16",
    )  # fmt: skip
    return to_config_dict(
        TokenizerConfig(
            batch_size=256,
            model=model,
            preprocess=Preprocess(256, "center_crop"),
            ema_decay=0.999,
            data=ImagesConfig(heldout_fraction=0.001, rgb_share=1.0),
            loss=LossConfig(l1=1.0, l2=0.0, gradient=0.0, perceptual=LPIPS(weight=1.0), autoencoder_steps=0),
            adversarial=AdversarialConfig(
                weight=0.04, start_step=0, lecam=0.05, discriminator=PatchGAN(), optimizer=_ADAM
            ),
            optimizer=_ADAM,
            loop=LoopConfig(
                total_steps=_STEPS, checkpoint_every=5000, picture_every=10_000, evaluate_every=10_000, input_workers=16
            ),
        )
    )
