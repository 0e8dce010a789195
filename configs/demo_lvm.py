"""The demo's transformer: 1.0M parameters over sentences of 8 images of 64 codes, on two CPU cores.

Trained on the store of configs/demo_scenes.py, encoded by configs/demo_tokenizer.py's tokenizer.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.model.transformer import ModelConfig
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig


def get_config() -> ConfigDict:
    """A sentence is BOS, 8 grids of 64 codes and EOS, 514 tokens: with this context, a row is one sentence."""
    model = ModelConfig(
        hidden_size=128,
        mlp_size=352,
        num_layers=4,
        num_heads=2,
        context=514,
        dtype="float32",
        init_std=0.06,
        remat="dots",
    )
    components = {
        "video": ComponentConfig(Video(frames=8, strides=(1,)), weight=0.40),
        "segmentation": ComponentConfig(Pairs(target="segmentation", shots=4), weight=0.30),
        "depth": ComponentConfig(Pairs(target="depth", shots=4), weight=0.15),
        "edges": ComponentConfig(Pairs(target="edges", shots=4), weight=0.15),
        # For images other than the generated scenes; `make demo IMAGES=…` sets the weights.
        "normals": ComponentConfig(Pairs(target="normals", shots=4), weight=0.0),
        "boxes": ComponentConfig(Pairs(target="boxes", shots=4), weight=0.0),
        "pose": ComponentConfig(Pairs(target="pose", shots=4), weight=0.0),
        "single": ComponentConfig(Single(), weight=0.0),
    }
    return to_config_dict(
        TrainConfig(
            batch_size=2,
            model=model,
            data=MixtureConfig(components, store=("runs/demo/store",), heldout_fraction=0.15),
            optimizer=OptimizerConfig(
                learning_rate=2.5e-3, end_learning_rate=2e-5, warmup_steps=100, b2=0.99, weight_decay=0.05
            ),
            loop=LoopConfig(
                total_steps=3200, log_every=100, evaluate_every=800, picture_every=800, checkpoint_every=200
            ),
        )
    )
