"""Weights of another model as the initial ones; `tests/lvm/test_convert.py` has the checks of a whole run."""

import jax
import numpy as np

from lvm.interop.init_from import load_weights
from tests.lvm.small_models import small_model


def test_load_weights_frees_the_fresh_parameters():
    checkpoint = small_model()
    fresh = jax.tree.map(lambda tensor: jax.numpy.zeros(tensor.shape, tensor.dtype), checkpoint.tree())
    loaded = load_weights(checkpoint, {"params": fresh, "step": 5})
    assert all(array.is_deleted() for array in jax.tree.leaves(fresh))  # a device may not have room for both
    assert loaded["step"] == 5
    jax.tree.map(lambda x, tensor: np.testing.assert_array_equal(x, tensor.read()), loaded["params"], checkpoint.tree())
