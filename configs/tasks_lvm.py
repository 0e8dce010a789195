"""A transformer of 1.6M parameters for video and six tasks by example, one with a changing rule, on two CPU cores.

Trained on the store of configs/tasks_scenes.py, encoded by configs/tasks_tokenizer.py's tokenizer (docs/evaluation.md).
"""

from ml_collections import ConfigDict

from configs.tasks_scenes import PALETTES
from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, VaryingPairs, Video
from lvm.model.transformer import ModelConfig
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig


def get_config() -> ConfigDict:
    """Sentences are of at most 10 images of 36 codes, so that whole ones fit: four pairs, a query and its answer."""
    model = ModelConfig(
        hidden_size=128,
        mlp_size=384,
        num_layers=6,
        num_heads=2,
        context=362,
        dtype="float32",
        init_std=0.06,
        remat="dots",
    )
    components = {
        "video": ComponentConfig(Video(frames=8, strides=(2,)), weight=0.35),
        "segmentation": ComponentConfig(Pairs(target="segmentation", shots=5), weight=0.13),
        # Of one class, as in few-shot segmentation: every example shows what its query asks for.
        "palettes": ComponentConfig(VaryingPairs(targets=PALETTES, shots=5, same_class=True), weight=0.20),
        "mask": ComponentConfig(Pairs(target="mask", shots=5, same_class=True), weight=0.08),
        "depth": ComponentConfig(Pairs(target="depth", shots=5), weight=0.08),
        "edges": ComponentConfig(Pairs(target="edges", shots=5), weight=0.12),
        "normals": ComponentConfig(Pairs(target="normals", shots=5), weight=0.04),
    }
    return to_config_dict(
        TrainConfig(
            batch_size=2,
            model=model,
            # Inputs of pairs would take half of the loss, and no task by example asks for their codes.
            data=MixtureConfig(
                components, store=("runs/tasks/store",), heldout_fraction=0.15, packing="whole", loss="answers"
            ),
            optimizer=OptimizerConfig(
                learning_rate=2.5e-3, end_learning_rate=2e-5, warmup_steps=200, b2=0.99, weight_decay=0.05
            ),
            loop=LoopConfig(
                total_steps=26000, log_every=200, evaluate_every=4000, picture_every=8000, checkpoint_every=500
            ),
        )
    )
