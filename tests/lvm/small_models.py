"""Small transformers at rest, every number drawn: a tensor that is swapped, turned or left out shows."""

import numpy as np

from lvm.interop import tensors
from lvm.interop.lazy_checkpoint import DTYPES, NO_RECORD, LazyCheckpoint, tensor_shapes
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary

PUBLISHED = Vocabulary(8192, 8292, bos=None, eos=None, pad=8192)
OURS = Vocabulary.for_codes(8192)
SMALL = Vocabulary.for_codes(16)


def small_config(vocabulary=SMALL, **changes):
    sizes = {"hidden_size": 16, "mlp_size": 24, "num_layers": 3, "num_heads": 2, "context": 32}
    sizes |= {"dtype": "float32", "attention": "xla", "vocabulary_size": vocabulary.size}
    return ModelConfig(**{**sizes, **changes})


def small_model(vocabulary=SMALL, dtype="float32", seed=0, step=7, spread=0.15, **changes):
    """Weights large enough that attention picks its keys by their positions; scales away from 1."""
    config = small_config(vocabulary, **changes)
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in tensor_shapes(config).items():
        array = np.float32(name.endswith("scale")) + spread * rng.standard_normal(shape, np.float32)
        found[name] = tensors.from_array(array.astype(DTYPES[dtype]))
    return LazyCheckpoint(config, vocabulary, found, NO_RECORD, step, "a small model")


def assert_same_tensors(found, wanted):
    """That two models hold the same numbers, bit by bit, under the same names."""
    assert list(found.tensors) == list(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        read, right = found.tensors[name].read(), tensor.read()
        assert (read.dtype, read.shape) == (right.dtype, right.shape), name
        assert found.tensors[name].dtype == right.dtype, name
        assert read.tobytes() == right.tobytes(), name


def assert_same_model(found, wanted):
    """The same, and that they are the same model otherwise."""
    assert_same_tensors(found, wanted)
    assert (found.config, found.vocabulary, found.step) == (wanted.config, wanted.vocabulary, wanted.step)
