"""Two checkpoints compared: equal ones are equal, and what differs is named by its place."""

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

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def changed(checkpoint, name, by):
    """The same but for one number of one tensor."""
    array = checkpoint.tensors[name].read()
    array.flat[3] += by
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: tensors.from_array(array)})


def test_equal_models_are_equal_whatever_they_are_stored_as(tmp_path):
    checkpoint = small_model(num_heads=4, num_kv_heads=2, context=300)
    for kind in ("hf", "easylm"):
        models.write(tmp_path / kind, checkpoint, kind)
    found = compare(models.read(tmp_path / "hf"), models.read(tmp_path / "easylm"))
    assert not found.max_abs_diff.any()
    assert found.max_abs_diff.shape == (300,)
    assert found.first_difference is None
    assert found.logit_std > 0.1
    assert list(found.report())[-1] == "first layer that differs: none"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("embedding", "embedding"),
        ("layers.0.attention.key", "layer 0"),
        ("layers.1.mlp.down", "layer 1"),
        ("layers.2.attention_norm.scale", "layer 2"),
        ("norm.scale", "the norm after the layers"),
        ("head", "the output projection"),
    ],
)
def test_the_first_layer_that_differs_is_named(name, first):
    checkpoint = small_model()
    found = compare(checkpoint, changed(checkpoint, name, 0.5), num_rows=8)
    assert found.first_difference == first
    assert found.relative_difference > 1e-3
    assert found.max_abs_diff.max() > 1e-3
    assert found.kl.max() > 0
    assert f"first layer that differs: {first}, by" in list(found.report())[-1]


def test_figures_are_those_of_the_logits(tmp_path):
    first, second = small_model(), changed(small_model(), "layers.1.mlp.up", 2.0)
    found = compare(first, second, num_rows=3, seed=5)
    logits = []
    for number, checkpoint in enumerate((first, second)):
        models.write(tmp_path / str(number), checkpoint, "hf")
        tokens = np.random.default_rng(5).integers(0, 16, (3, 32))
        logits.append(LVM.load(tmp_path / str(number)).logits(tokens)[..., :16].astype(np.float64))
    np.testing.assert_allclose(found.max_abs_diff, np.abs(logits[0] - logits[1]).max((0, 2)), atol=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(-1).mean(0), atol=1e-6)


def test_a_wrong_permutation_shows_at_late_positions():
    """Heads turned by the other convention: alike at position 0, apart later."""
    checkpoint = small_model(context=200)
    turned = dict(checkpoint.tensors)
    for name in ("query", "key"):
        array = checkpoint.tensors[f"layers.0.attention.{name}"].read()
        D, H, d = array.shape
        wrong = array.reshape(D, H, 2, d // 2).swapaxes(2, 3).reshape(D, H, d)
        turned[f"layers.0.attention.{name}"] = tensors.from_array(wrong)
    found = compare(checkpoint, dataclasses.replace(checkpoint, tensors=turned))
    assert found.first_difference == "layer 0"
    assert found.max_abs_diff[0] < 1e-5
    assert found.max_abs_diff[100:].max() > 1e-2


def test_another_vocabulary_of_the_same_codes_compares():
    checkpoint = small_model()
    assert compare(checkpoint, resize_vocabulary(checkpoint, 300)).first_difference is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_layers": 2}, "num_layers: 3, there 2"),
        ({"hidden_size": 32}, "hidden_size: 16, there 32"),
        ({"vocabulary": Vocabulary.for_codes(32)}, "num_codes: 16, there 32"),
    ],
)
def test_what_can_not_be_one_model_is_refused(other, words):
    with pytest.raises(UserError, match=f"not one model .*{words}"):
        compare(small_model(), small_model(**other))
