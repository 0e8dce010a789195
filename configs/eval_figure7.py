"""Perplexity of a video's next frame against 1 to 15 frames of context: the LVM paper's Figure 7 (arXiv 2312.00785).

lvm evaluate --config=configs/eval_figure7.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER \
    --config.evaluations.figure7.data.store="('STORE',)"

The paper measures Kinetics-700: perplexity falls from 62.1 to 48.4 and is flat after eleven frames. STORE holds videos,
encoded by TOKENIZER, that the model was not trained on.
"""

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Video
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluators.perplexity import Perplexity


def get_config() -> ConfigDict:
    """Sixteen frames fill the context of 4096 tokens."""
    components = {"video": ComponentConfig(Video(frames=16, strides=(10,)))}
    data = MixtureConfig(components, store=("runs/store",), heldout_fraction=0.0)
    return to_config_dict(EvalConfig({"figure7": Perplexity(num_sentences=1000, data=data)}, data=data))
