"""Evaluation of configs/tasks_lvm.py on configs/tasks_unseen_scenes.py (docs/evaluation.md)."""

from typing import Any

from ml_collections import ConfigDict

from configs.tasks_scenes import PALETTES
from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluator import Evaluator
from lvm.evaluation.evaluators.curves import Curves
from lvm.evaluation.evaluators.depth import DepthTask
from lvm.evaluation.evaluators.edges import EdgesTask
from lvm.evaluation.evaluators.likelihood import Likelihood
from lvm.evaluation.evaluators.normals import NormalsTask
from lvm.evaluation.evaluators.perplexity import Perplexity
from lvm.evaluation.evaluators.reconstruction import Reconstruction
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.evaluators.task_following import TaskFollowing
from lvm.evaluation.evaluators.varying_segmentation import VaryingSegmentation
from lvm.evaluation.evaluators.video import VideoContinuation


def get_config() -> ConfigDict:
    """Each task by four example pairs, and by one to three to see whether examples help: one query a scene."""
    by_example: dict[str, Any] = {"num_queries": 900, "shots": 4, "sweep": (1, 2, 3)}
    evaluations: dict[str, Evaluator] = {
        "curves": Curves(),
        "depth": DepthTask(**by_example),
        "edges": EdgesTask(**by_example, thresholds=9),  # 99 take minutes
        "likelihood": Likelihood(),
        "mask": Segmentation(**by_example, target="mask", same_class=True),
        "mask_any_class": Segmentation(**by_example, target="mask"),
        "normals": NormalsTask(**by_example),
        "palettes": VaryingSegmentation(**by_example, targets=PALETTES, same_class=True),
        # The color of the commonest shapes in the examples doesn't do here.
        "palettes_any_class": VaryingSegmentation(**by_example, targets=PALETTES),
        "perplexity": Perplexity(),
        "reconstruction": Reconstruction(),
        "segmentation": Segmentation(**by_example),
        "task_following": TaskFollowing(num_queries=900, shots=4),
        "video": VideoContinuation(num_queries=900),
    }
    return to_config_dict(EvalConfig(evaluations, source="configs/tasks_unseen_scenes.py", unseen=True, max_scenes=900))
