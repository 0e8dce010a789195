"""Random weights of Inception, with which features keep their scale from block to block."""

import numpy as np

from tokenizer.evaluation import inception


def random_tensors():
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in inception.tensor_shapes().items():
        if len(shape) == 4:
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith(("bn.weight", "running_var")):
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            tensors[name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def images(count):
    return np.random.default_rng(1).integers(0, 256, (count, 299, 299, 3), dtype=np.uint8)
