"""The demo's evaluation, on the held-out scenes of configs/demo_scenes.py."""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluator import Evaluator
from lvm.evaluation.evaluators.curves import Curves
from lvm.evaluation.evaluators.depth import DepthTask
from lvm.evaluation.evaluators.edges import EdgesTask
from lvm.evaluation.evaluators.likelihood import Likelihood
from lvm.evaluation.evaluators.perplexity import Perplexity
from lvm.evaluation.evaluators.reconstruction import Reconstruction
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.evaluators.task_following import TaskFollowing
from lvm.evaluation.evaluators.video import VideoContinuation


def get_config() -> ConfigDict:
    """Evaluations of annotations that the images lack are skipped."""
    evaluations: dict[str, Evaluator] = {
        "curves": Curves(),
        "depth": DepthTask(num_queries=192),
        "edges": EdgesTask(num_queries=192, thresholds=9),  # 99 take minutes
        "likelihood": Likelihood(),
        "perplexity": Perplexity(),
        "reconstruction": Reconstruction(),
        "segmentation": Segmentation(num_queries=192),
        "task_following": TaskFollowing(num_queries=192),
        "video": VideoContinuation(),
    }
    return to_config_dict(EvalConfig(evaluations, source="configs/demo_scenes.py"))
