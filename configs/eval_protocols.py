"""Evaluations of the LVM paper's prompted tasks by the field's protocols, for data sets by path (docs/evaluation.md).

lvm evaluate --config=configs/eval_protocols.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER --config.source=SOURCE

SOURCE is a folder or an image source's config file (docs/data.md) that the model never saw. Tasks whose streams it
lacks are skipped.
"""

from typing import Any

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluator import Evaluator
from lvm.evaluation.evaluators.colorization import Colorization
from lvm.evaluation.evaluators.depth import DepthTask
from lvm.evaluation.evaluators.detection import Detection
from lvm.evaluation.evaluators.edges import EdgesTask
from lvm.evaluation.evaluators.keypoints import Keypoints
from lvm.evaluation.evaluators.normals import NormalsTask
from lvm.evaluation.evaluators.reconstruction import Reconstruction
from lvm.evaluation.evaluators.restoration import Restoration
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.evaluators.video import VideoContinuation


def get_config() -> ConfigDict:
    """1000 queries of four example pairs, as many as visual prompting asks a fold of Pascal-5i."""
    by_example: dict[str, Any] = {"num_queries": 1000, "shots": 4}
    evaluations: dict[str, Evaluator] = {
        "colorization": Colorization(**by_example),
        "denoising": Restoration(**by_example, input="noisy"),
        "depth": DepthTask(**by_example),
        "deraining": Restoration(**by_example, input="rain"),
        "detection": Detection(**by_example),
        "edges": EdgesTask(**by_example),
        "inpainting": Restoration(**by_example, input="masked"),
        "keypoints": Keypoints(**by_example),
        "normals": NormalsTask(**by_example),
        "reconstruction": Reconstruction(),
        "segmentation": Segmentation(**by_example, same_class=True),
        "video": VideoContinuation(),
    }
    derived = ("gray", "masked", "noisy", "rain")
    return to_config_dict(EvalConfig(evaluations, source="SOURCE", derived=derived, unseen=True, max_scenes=2000))
