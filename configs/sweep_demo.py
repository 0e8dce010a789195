"""IsoFLOP sweep of tiny transformers on the demo's generated scenes: 4 budgets of 5 sizes, on two CPU cores.

Needs the demo's tokenizer and store (`make demo`). The learning rate is that of width 32, which muP carries over to the
others. Each finished run is evaluated by segmentation too.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.rules import RuleConfig
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.space import chain, isoflop, param, product

# Budget → widths around its expected minimum.
WIDTHS = {
    6e11: (8, 16, 24, 32, 48),
    1e12: (8, 16, 24, 32, 48),
    1.8e12: (16, 24, 32, 48, 64),
    3e12: (24, 32, 40, 48, 64),
}


def get_config() -> ConfigDict:
    depth = param("num_layers", 2)
    points = chain(*(isoflop([budget], product(param("width", *widths), depth)) for budget, widths in WIDTHS.items()))
    return to_config_dict(
        SweepConfig(
            train="configs/sweep_demo_train.py",
            points=make_points(points),
            shape=ShapeConfig(head_dim=8, multiple=8),
            rule=RuleConfig("fixed"),
            # 1275 training clips of 8 frames of 4 streams, each of 64 codes. The mixture draws on them unevenly: at 4.0
            # epochs by this count the 8 frames of a clip come up 6.3 times as a video.
            unique_tokens=2.6e6,
            max_epochs=5.0,
            num_codes=512,
            device_flops=2e10,  # of two cores
            evaluation=("--config=configs/eval_sweep.py", "--tokenizer=runs/demo/tokenizer"),
            tokens_per_param=75.0,  # such models, of few steps of small batches, want more than the 20 of large ones
        )
    )
