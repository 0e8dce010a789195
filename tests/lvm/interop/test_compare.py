"""Comparison of checkpoints: equal models, the first module that differs, and the figures."""

import dataclasses

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.inference.pretrained import LVM
from lvm.interop import models, tensors
from lvm.interop.compare import compare
from lvm.interop.lazy_checkpoint import resize_vocabulary
from lvm.model.vocabulary import Vocabulary
from tests.lvm.small_models import small_model


def changed(checkpoint, name, by):
    """The checkpoint with one value of one tensor changed."""
    array = checkpoint.tensors[name].read()
    array.flat[3] += by
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: tensors.from_array(array)})


def test_compare_equal_models_in_two_formats(tmp_path):
    checkpoint = small_model(num_heads=4, num_kv_heads=2, context=300)
    for format in ("hf", "easylm"):
        models.write(tmp_path / format, checkpoint, format)
    comparison = compare(models.read(tmp_path / "hf"), models.read(tmp_path / "easylm"))
    assert not comparison.max_abs_diff.any()
    assert comparison.max_abs_diff.shape == (300,)
    assert comparison.first_difference is None
    assert comparison.logit_std > 0.1
    assert list(comparison.report())[-1] == "first difference: none"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("embedding", "embedding"),
        ("layers.0.attention.key", "layer 0"),
        ("layers.1.mlp.down", "layer 1"),
        ("layers.2.attention_norm.scale", "layer 2"),
        ("norm.scale", "final norm"),
        ("head", "output projection"),
    ],
)
def test_compare_names_first_difference(name, first):
    checkpoint = small_model()
    comparison = compare(checkpoint, changed(checkpoint, name, 0.5), num_rows=8)
    assert comparison.first_difference == first
    assert comparison.relative_difference > 1e-3
    assert comparison.max_abs_diff.max() > 1e-3
    assert comparison.kl.max() > 0
    assert f"first difference: {first} (" in list(comparison.report())[-1]


def test_compare_figures_match_logits(tmp_path):
    first, second = small_model(), changed(small_model(), "layers.1.mlp.up", 2.0)
    comparison = compare(first, second, num_rows=3, seed=5)
    logits = []
    for i, checkpoint in enumerate((first, second)):
        models.write(tmp_path / str(i), checkpoint, "hf")
        tokens = np.random.default_rng(5).integers(0, 16, (3, 32))
        logits.append(LVM.load(tmp_path / str(i)).logits(tokens)[..., :16].astype(np.float64))
    np.testing.assert_allclose(comparison.max_abs_diff, np.abs(logits[0] - logits[1]).max((0, 2)), atol=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    np.testing.assert_allclose(comparison.kl, (p * np.log(p / q)).sum(-1).mean(0), atol=1e-6)


def test_compare_wrong_rope_layout_differs_at_late_positions():
    """Interleaved heads: equal logits at position 0, different ones later."""
    checkpoint = small_model(context=200)
    permuted = dict(checkpoint.tensors)
    for name in ("query", "key"):
        array = checkpoint.tensors[f"layers.0.attention.{name}"].read()
        D, H, d = array.shape
        wrong = array.reshape(D, H, 2, d // 2).swapaxes(2, 3).reshape(D, H, d)
        permuted[f"layers.0.attention.{name}"] = tensors.from_array(wrong)
    comparison = compare(checkpoint, dataclasses.replace(checkpoint, tensors=permuted))
    assert comparison.first_difference == "layer 0"
    assert comparison.max_abs_diff[0] < 1e-5
    assert comparison.max_abs_diff[100:].max() > 1e-2


def test_compare_ignores_ids_other_than_codes():
    checkpoint = small_model()
    assert compare(checkpoint, resize_vocabulary(checkpoint, 300)).first_difference is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_layers": 2}, "num_layers: 3 and 2"),
        ({"hidden_size": 32}, "hidden_size: 16 and 32"),
        ({"vocabulary": Vocabulary.for_codes(32)}, "num_codes: 16 and 32"),
    ],
)
def test_compare_rejects_different_sizes(other, message):
    with pytest.raises(UserError, match=message):
        compare(small_model(), small_model(**other))
