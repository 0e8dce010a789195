"""Perplexity of four annotations after five example pairs: the protocol of the LVM paper's Figure 4 (arXiv 2312.00785).

lvm evaluate --config=configs/eval_figure4.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER \
    --config.evaluations.figure4.data.store="('STORE',)"

The paper measures the ImageNet validation set, with annotations by pretrained networks: STORE holds such images with
the streams segmentation, depth, normals and edges (docs/data.md), encoded by TOKENIZER. All of its scenes are measured:
the model must not have been trained on it. A component whose stream is missing is left out.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluators.perplexity import Perplexity


def get_config() -> ConfigDict:
    """Six pairs are twelve images; the figure's point is the last answer, after eleven."""
    targets = ("segmentation", "depth", "normals", "edges")
    components = {target: ComponentConfig(Pairs(target=target, shots=6)) for target in targets}
    data = MixtureConfig(components, store=("runs/store",), heldout_fraction=0.0, allow_missing=True)
    return to_config_dict(EvalConfig({"figure4": Perplexity(num_sentences=1000, data=data)}, data=data))
