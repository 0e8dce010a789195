"""LazyCheckpoint: parameter trees, and casts and resized vocabularies that keep what they can bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.interop import tensors
from lvm.interop.lazy_checkpoint import DTYPES, layer_names, resize_vocabulary, tensor_shapes, with_dtype
from lvm.model.nnx_utils import abstract_module, count_params
from lvm.model.transformer import Transformer
from lvm.model.vocabulary import Vocabulary
from tests.lvm.small_models import OURS, PUBLISHED, SMALL, assert_same_model, small_config, small_model


@given(heads=st.sampled_from([(2, 0), (4, 2), (4, 1)]), layers=st.integers(1, 4), tied=st.booleans())
@settings(max_examples=10)
def test_load_params_matches_transformer(heads, layers, tied):
    checkpoint = small_model(num_heads=heads[0], num_kv_heads=heads[1], num_layers=layers, tie_embeddings=tied)
    _, expected = abstract_module(lambda rngs: Transformer(checkpoint.config, rngs))
    params = checkpoint.load_params()
    assert count_params(params) == count_params(expected) == sum(t.read().size for t in checkpoint.tensors.values())
    for name, tensor in checkpoint.tensors.items():
        *path, leaf = name.split(".")
        node = params
        for key in [key for key in path if not key.isdigit()]:
            node = node[key]
        array = node[leaf][int(path[1])] if path and path[0] == "layers" else node[leaf]
        np.testing.assert_array_equal(array, tensor.read())
    assert checkpoint.load_layer(0)["mlp"]["gate"].shape == (16, 24)


def test_layer_names_and_order():
    assert layer_names("layers.mlp.gate", small_config())[2] == "layers.2.mlp.gate"
    first, *_, before_last, last = tensor_shapes(small_config())
    assert (first, before_last, last) == ("embedding", "norm.scale", "head")


# --- Resized vocabularies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_resize_vocabulary_larger_appends_mean(tied):
    checkpoint = small_model(PUBLISHED, tie_embeddings=tied)
    result = resize_vocabulary(checkpoint, 8448)
    assert result.vocabulary == Vocabulary(8192, 8448, bos=None, eos=None, pad=8192)
    assert result.config.vocabulary_size == 8448
    old, new = checkpoint.tensors["embedding"].read(), result.tensors["embedding"].read()
    assert new[:8292].tobytes() == old.tobytes()
    np.testing.assert_allclose(new[8292:], np.tile(old.astype(np.float64).mean(0), (156, 1)), atol=1e-6)
    assert ("head" in result.tensors) != tied
    if not tied:
        old, new = checkpoint.tensors["head"].read(), result.tensors["head"].read()
        assert result.tensors["head"].shape == new.shape == (16, 8448)
        np.testing.assert_array_equal(new[:, :8292], old)
        np.testing.assert_allclose(new[:, 8292], old.astype(np.float64).mean(1), atol=1e-6)
    assert_same_model(resize_vocabulary(result, 8292), checkpoint)  # and back


def test_resize_vocabulary_smaller_cuts_unused_ids():
    checkpoint = small_model(OURS)
    result = resize_vocabulary(checkpoint, 8292)
    assert result.vocabulary == Vocabulary(8192, 8292, bos=8192, eos=8193, pad=8194)
    np.testing.assert_array_equal(result.tensors["embedding"].read(), checkpoint.tensors["embedding"].read()[:8292])
    assert_same_model(resize_vocabulary(checkpoint, 8448), checkpoint)
    with pytest.raises(
        UserError,
        match=r"8194 would cut off .*8192 codes and bos 8192, eos 8193, pad 8194; use at least 8195",
    ):
        resize_vocabulary(checkpoint, 8194)
    with pytest.raises(UserError, match=r"15 would cut off .*16 codes and no specials; use at least 16"):
        resize_vocabulary(small_model(Vocabulary(16, 20, None, None, None)), 15)


def test_resize_vocabulary_takes_mean_in_float32():
    checkpoint = small_model(SMALL, "bfloat16")
    added = resize_vocabulary(checkpoint, 280).tensors["embedding"].read()[-1]
    mean = checkpoint.tensors["embedding"].read().astype(np.float32).mean(0)
    np.testing.assert_array_equal(added, mean.astype(DTYPES["bfloat16"]))


# --- Dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_dtype_rounds(dtype):
    checkpoint = small_model()
    result = with_dtype(checkpoint, dtype)
    assert result.dtype == dtype
    for name, tensor in result.tensors.items():
        assert tensor.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(tensor.read(), checkpoint.tensors[name].read().astype(DTYPES[dtype]))
    assert_same_model(with_dtype(with_dtype(result, "float32"), dtype), result)  # widening is exact


def test_cast_overflow_is_an_error():
    tensor = tensors.from_array(np.array([1.0, 7e4], np.float32))
    with pytest.raises(UserError, match=r"mlp\.up: .*7e\+04.*float16"):
        tensors.cast(tensor, DTYPES["float16"], "mlp.up").read()
    infinite = tensors.from_array(np.array([1.0, np.inf], np.float32))
    assert np.isinf(tensors.cast(infinite, DTYPES["float16"], "x").read()[1])  # infinite before the cast
