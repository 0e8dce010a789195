"""IsoFLOP sweep of the paper's architecture on the paper's data: 1e18 to 1e21 FLOPs, 30M to 7B parameters.

Hardware: 8 H100 a run; `lvm sweep plan --config=configs/sweep_isoflop.py --dry_run` prints the price. Not run.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.rules import RuleConfig
from lvm.scaling.space import chain, isoflop, param

# Budget → widths around its expected minimum.
WIDTHS = {
    1e18: (512, 640, 768, 896, 1024),
    1e19: (768, 1024, 1152, 1280, 1536),
    1e20: (1280, 1536, 1792, 2048, 2560),
    1e21: (2048, 2560, 3072, 3584, 4096),
}


def get_config() -> ConfigDict:
    points = chain(*(isoflop([budget], param("width", *widths)) for budget, widths in WIDTHS.items()))
    return to_config_dict(
        SweepConfig(
            train="configs/lvm_300m.py",
            points=make_points(points),
            rule=RuleConfig("square_root_batch", target_steps=2**14),
            unique_tokens=420e9,
            max_epochs=1.0,
            accelerator="h100-8",
        )
    )
