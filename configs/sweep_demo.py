"""IsoFLOP sweep of tiny transformers on the demo's generated scenes: 4 budgets of 5 sizes, on two CPU cores.

Needs the demo's tokenizer and store (`make demo`). Each finished run is evaluated by segmentation too.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.rules import RuleConfig
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.space import chain, isoflop, param, product

# Budget → widths around its expected minimum.
WIDTHS = {
    5e11: (16, 24, 32, 48, 64),
    1e12: (24, 32, 48, 64, 80),
    2e12: (24, 32, 48, 64, 80),
    4e12: (32, 48, 64, 80, 96),
}


def get_config() -> ConfigDict:
    points = chain(
        *(
            isoflop([budget], product(param("width", *widths), param("num_layers", 2)))
            for budget, widths in WIDTHS.items()
        )
    )
    return to_config_dict(
        SweepConfig(
            train="configs/sweep_demo_train.py",
            points=make_points(points),
            shape=ShapeConfig(head_dim=8, multiple=8),
            rule=RuleConfig("fixed"),
            # 1275 training clips of 8 frames of 4 streams, each of 64 codes.
            unique_tokens=2.6e6,
            max_epochs=5.0,
            num_codes=512,
            device_flops=2e10,  # of two cores
            evaluation=(
                "--config=configs/eval_demo.py",
                *(
                    f"--config.evaluations.{task}.num_queries=64"
                    for task in ("depth", "edges", "segmentation", "task_following")
                ),
                *(f"--config.evaluations.{name}.num_sentences=64" for name in ("likelihood", "perplexity")),
                "--tokenizer=runs/demo/tokenizer",
            ),
        )
    )
