"""Small checkpoints of random values, so that a tensor that is swapped, transposed or missing shows."""

import numpy as np

from lvm.interop import models, tensors
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
    """A checkpoint with weights large enough that attention depends on positions, and scales that differ from 1."""
    config = small_config(vocabulary, **changes)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in tensor_shapes(config).items():
        array = np.float32(name.endswith("scale")) + spread * rng.standard_normal(shape, np.float32)
        arrays[name] = tensors.from_array(array.astype(DTYPES[dtype]))
    return LazyCheckpoint(config, vocabulary, arrays, NO_RECORD, step, "a small model")


def undeclared(folder, vocabulary, **sizes):
    """Writes an export without the files that declare its vocabulary and record; returns the folder."""
    models.write(folder, small_model(vocabulary, **sizes), "hf")
    (folder / "vocabulary.json").unlink()
    (folder / "lvm.json").unlink()
    return folder


def assert_same_tensors(actual, expected):
    """Asserts bit-identical tensors of the same names, in the same order."""
    assert list(actual.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        a, b = actual.tensors[name].read(), tensor.read()
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert actual.tensors[name].dtype == b.dtype, name
        assert a.tobytes() == b.tobytes(), name


def assert_same_model(actual, expected):
    """Asserts bit-identical tensors and equal config, vocabulary and step."""
    assert_same_tensors(actual, expected)
    assert (actual.config, actual.vocabulary, actual.step) == (
        expected.config,
        expected.vocabulary,
        expected.step,
    )
