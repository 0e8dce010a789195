"""Evaluation of each run of configs/sweep_demo.py: what models of different sizes are compared by."""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluators.perplexity import Perplexity
from lvm.evaluation.evaluators.segmentation import Segmentation


def get_config() -> ConfigDict:
    evaluations = {"perplexity": Perplexity(num_sentences=64), "segmentation": Segmentation(num_queries=64)}
    return to_config_dict(EvalConfig(evaluations, source="configs/demo_scenes.py"))
