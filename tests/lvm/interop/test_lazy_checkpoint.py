"""A model at rest, in another type or with another vocabulary: what is kept is kept bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.interop import tensors
from lvm.interop.lazy_checkpoint import DTYPES, layer_names, shapes, with_dtype, with_vocabulary
from lvm.model.nnx_utils import abstract_module, count_params
from lvm.model.transformer import Transformer
from lvm.model.vocabulary import Vocabulary
from tests.lvm.stored_models import OURS, PUBLISHED, SMALL, same_model, small_config, small_model


@given(heads=st.sampled_from([(2, 0), (4, 2), (4, 1)]), layers=st.integers(1, 4), tied=st.booleans())
@settings(max_examples=10)
def test_the_tensors_are_those_of_the_transformer(heads, layers, tied):
    stored = small_model(num_heads=heads[0], num_kv_heads=heads[1], num_layers=layers, tie_embeddings=tied)
    _, wanted = abstract_module(lambda rngs: Transformer(stored.config, rngs))
    params = stored.params()
    assert count_params(params) == count_params(wanted) == sum(t.read().size for t in stored.tensors.values())
    for name, tensor in stored.tensors.items():
        *path, leaf = name.split(".")
        node = params
        for key in [key for key in path if not key.isdigit()]:
            node = node[key]
        array = node[leaf][int(path[1])] if path and path[0] == "layers" else node[leaf]
        np.testing.assert_array_equal(array, tensor.read())
    assert stored.layer(0)["mlp"]["gate"].shape == (16, 24)


def test_names_of_layers():
    assert layer_names("layers.mlp.gate", small_config())[2] == "layers.2.mlp.gate"
    first, *_, before_last, last = shapes(small_config())
    assert (first, before_last, last) == ("embedding", "norm.scale", "head")


# --- Vocabularies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_keeps_every_row_and_adds_their_mean(tied):
    stored = small_model(PUBLISHED, tie_embeddings=tied)
    found = with_vocabulary(stored, 8448)
    assert found.vocabulary == Vocabulary(8192, 8448, bos=None, eos=None, pad=8192)
    assert found.config.vocabulary_size == 8448
    old, new = stored.tensors["embedding"].read(), found.tensors["embedding"].read()
    assert new[:8292].tobytes() == old.tobytes()
    np.testing.assert_allclose(new[8292:], np.tile(old.astype(np.float64).mean(0), (156, 1)), atol=1e-6)
    assert ("head" in found.tensors) != tied
    if not tied:
        old, new = stored.tensors["head"].read(), found.tensors["head"].read()
        assert found.tensors["head"].shape == new.shape == (16, 8448)
        np.testing.assert_array_equal(new[:, :8292], old)
        np.testing.assert_allclose(new[:, 8292], old.astype(np.float64).mean(1), atol=1e-6)
    same_model(with_vocabulary(found, 8292), stored)  # and back


def test_a_smaller_vocabulary_cuts_off_unused_ids_alone():
    stored = small_model(OURS)
    found = with_vocabulary(stored, 8292)
    assert found.vocabulary == Vocabulary(8192, 8292, bos=8192, eos=8193, pad=8194)
    np.testing.assert_array_equal(
        found.tensors["embedding"].read(), stored.tensors["embedding"].read()[:8292]
    )
    same_model(with_vocabulary(stored, 8448), stored)
    with pytest.raises(
        UserError,
        match=r"cut off some of its 8192 codes and bos 8192, eos 8193, pad 8194; it needs 8195",
    ):
        with_vocabulary(stored, 8194)
    with pytest.raises(UserError, match="would cut off some of its 16 codes and no specials; it needs 16"):
        with_vocabulary(small_model(Vocabulary(16, 20, None, None, None)), 15)


def test_means_of_narrow_types_are_taken_in_float32():
    stored = small_model(SMALL, "bfloat16")
    added = with_vocabulary(stored, 280).tensors["embedding"].read()[-1]
    mean = stored.tensors["embedding"].read().astype(np.float32).mean(0)
    np.testing.assert_array_equal(added, mean.astype(DTYPES["bfloat16"]))


# --- Types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_changed_by_rounding(dtype):
    stored = small_model()
    found = with_dtype(stored, dtype)
    assert found.dtype == dtype
    for name, tensor in found.tensors.items():
        assert tensor.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(tensor.read(), stored.tensors[name].read().astype(DTYPES[dtype]))
    same_model(with_dtype(with_dtype(found, "float32"), dtype), found)  # widening loses nothing


def test_numbers_beyond_a_type_are_an_error_not_infinities():
    tensor = tensors.of_array(np.array([1.0, 7e4], np.float32))
    with pytest.raises(UserError, match=r"mlp\.up: holds numbers up to 7e\+04, beyond float16"):
        tensors.cast(tensor, DTYPES["float16"], "mlp.up").read()
    infinite = tensors.of_array(np.array([1.0, np.inf], np.float32))
    assert np.isinf(tensors.cast(infinite, DTYPES["float16"], "x").read()[1])  # it was so before
