"""Model folders: conversions between formats are bit-exact, and errors name what doesn't fit."""

import dataclasses
import json
import logging
import os
import re
import tempfile
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.inference.pretrained import LVM
from lvm.interop import models
from lvm.interop.layouts import EASYLM, HUGGING_FACE
from lvm.interop.lazy_checkpoint import NO_RECORD, stacked_shapes, tensor_shapes, with_dtype
from lvm.interop.tensors import from_array
from lvm.model.nnx_utils import abstract_module, init_params, merge
from lvm.model.parametrization import ParametrizationConfig
from lvm.model.transformer import Transformer
from lvm.model.vocabulary import Vocabulary
from lvm.training.checkpoint import open_params
from tests.lvm.small_models import (
    PUBLISHED,
    SMALL,
    assert_same_model,
    assert_same_tensors,
    small_config,
    small_model,
    undeclared,
)

pytest.importorskip("safetensors")


@settings(max_examples=5)
@given(
    chain=st.lists(st.sampled_from(models.FORMATS), min_size=1, max_size=3),
    kv_heads=st.sampled_from([0, 1, 2]),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    vocabulary=st.sampled_from([SMALL, Vocabulary(16, 20, None, None, 16)]),
    max_shard_bytes=st.sampled_from([1, 5000, 10**9]),
)
def test_chain_of_formats_is_bit_exact(chain, kv_heads, tied, dtype, vocabulary, max_shard_bytes):
    expected = small_model(vocabulary, dtype, num_heads=4, num_kv_heads=kv_heads, tie_embeddings=tied)
    loaded = expected
    with tempfile.TemporaryDirectory() as folder:
        for i, format in enumerate(chain):
            models.write(f"{folder}/{i}", loaded, format, max_shard_bytes)
            loaded = models.read(f"{folder}/{i}")
        assert_same_model(loaded, expected)


def test_layout_names_of_published_model():
    sizes = {"hidden_size": 4096, "mlp_size": 11008, "num_layers": 32, "num_heads": 32, "context": 4096}
    config = small_config(PUBLISHED, **sizes)
    theirs = HUGGING_FACE.shapes(config)
    assert len(theirs) == 32 * 9 + 3
    assert theirs["model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    assert theirs["model.embed_tokens.weight"] == theirs["lm_head.weight"] == (8292, 4096)
    easylm = EASYLM.shapes(config)
    assert easylm["transformer.h.31.feed_forward.w2.kernel"] == (11008, 4096)
    assert easylm["transformer.h.0.ffn_norm.kernel"] == (4096,)
    assert easylm["lm_head.kernel"] == (4096, 8292)
    assert easylm["transformer.wte.embedding"] == (8292, 4096)


# --- Workdirs ---------------------------------------------------------------------------------------------------


def test_written_workdir_is_complete_and_checksummed(tmp_path):
    expected = small_model()
    record = {**NO_RECORD, "config": {"seed": 3}, "tokenizer": {"hash": "a"}, "stores": ["b"]}
    models.write(tmp_path / "x", dataclasses.replace(expected, record=record), "orbax")
    loaded = models.read(tmp_path / "x")
    assert_same_model(loaded, expected)
    assert loaded.record["tokenizer"] == {"hash": "a"}
    assert loaded.record["config"]["seed"] == 3
    with pytest.raises(UserError, match="no checkpoint of step 9; it has 7"):
        models.read(tmp_path / "x", 9)
    data = max((tmp_path / "x" / "checkpoints" / "7" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged checkpoint: .*checksum"):
        models.read(tmp_path / "x")


def test_written_workdir_has_one_chunk_per_layer(tmp_path):
    models.write(tmp_path / "x", small_model(), "orbax")
    arrays = open_params(tmp_path / "x", 7, stacked_shapes(small_config()))
    assert {array.chunk_layout.read_chunk.shape[0] for name, array in arrays.items() if "layers" in name} == {1}


def test_write_orbax_rejects_layers_of_mixed_dtypes(tmp_path):
    checkpoint = small_model()
    mixed = dict(checkpoint.tensors)
    mixed["layers.1.mlp.up"] = with_dtype(checkpoint, "bfloat16").tensors["layers.1.mlp.up"]
    mixed_model = dataclasses.replace(checkpoint, tensors=mixed)
    with pytest.raises(UserError, match=r"layers\.mlp\.up: .*bfloat16, float32.*--dtype"):
        models.write(tmp_path / "x", mixed_model, "orbax")
    assert not (tmp_path / "x").exists()
    models.write(tmp_path / "x", with_dtype(mixed_model, "float32"), "orbax")


# --- Other folders, and all formats -----------------------------------------------------------------------------


def test_read_rejects_other_folders(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: doesn't exist; expected a workdir of lvm"):
        models.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a model folder: config\.json is missing"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQGANModel"}))
    with pytest.raises(UserError, match="_class_name: 'VQGANModel'"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "tokenizer"}))
    with pytest.raises(UserError, match="'tokenizer'"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8292}))
    with pytest.raises(UserError, match="weights: none"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: .*list"):
        models.read(tmp_path)


def test_read_rejects_step_or_weights_file(tmp_path):
    models.write(tmp_path / "x", small_model(), "hf")
    with pytest.raises(UserError, match="x: not a workdir"):
        models.read(tmp_path / "x", 3)
    with pytest.raises(UserError, match=r"model\.safetensors: a weights file"):
        models.read(tmp_path / "x" / "model.safetensors")


def test_read_names_damaged_record(tmp_path):
    models.write(tmp_path / "x", small_model(), "hf")
    (tmp_path / "x" / "lvm.json").write_text("{}")
    with pytest.raises(UserError, match=r"lvm\.json: expected record"):
        models.read(tmp_path / "x")
    (tmp_path / "x" / "lvm.json").unlink()
    assert_same_tensors(models.read(tmp_path / "x"), small_model())


def test_load_is_equal_in_every_format(tmp_path):
    checkpoint = small_model(num_heads=4, num_kv_heads=2)
    tokens = np.random.default_rng(0).integers(0, SMALL.size, (2, 32))
    answers = []
    for format in models.FORMATS:
        models.write(tmp_path / format, checkpoint, format)
        loaded = LVM.load(tmp_path / format)
        # The kernel of training may not run here.
        config = dataclasses.replace(checkpoint.config, attention="auto")
        assert (loaded.config, loaded.vocabulary, loaded.step) == (config, SMALL, 7)
        answers.append(loaded.logits(tokens))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("format", "dtype", "value"),
    [("orbax", "float32", np.nan), ("hf", "bfloat16", np.inf), ("easylm", "float16", -np.inf)],
)
def test_weights_that_are_not_finite_are_refused(format, dtype, value, tmp_path):
    checkpoint = small_model(dtype=dtype)
    up = checkpoint.tensors["layers.1.mlp.up"].read()
    up[3, 5] = value
    tensors = {**checkpoint.tensors, "layers.1.mlp.up": from_array(up)}
    models.write(tmp_path / "x", dataclasses.replace(checkpoint, tensors=tensors), format)
    opened = models.read(tmp_path / "x")  # reads no tensor
    message = r"x.*: layers\.(1\.)?mlp\.up: 1 of \d+ values are NaN or infinite"
    with pytest.raises(UserError, match=message):
        LVM.load(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        with_dtype(opened, "float32").tree()["layers"]["mlp"]["up"].read()  # as `init_from` does
    with pytest.raises(UserError, match=message):
        HUGGING_FACE.export_tensors(opened.tensors)["model.layers.1.mlp.up_proj.weight"].read()  # as `convert` does


@pytest.mark.parametrize("format", models.FORMATS)
def test_libraries_do_not_warn(format, tmp_path, caplog):
    """A notebook would show warnings on which the user can't act."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.write(tmp_path / "x", small_model(), format)
        LVM.load(tmp_path / "x")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("format", models.FORMATS)
def test_written_files_have_the_umasks_mode(format, tmp_path):
    umask = os.umask(0o027)
    try:
        models.write(tmp_path / "x", small_model(), format)
    finally:
        os.umask(umask)
    for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize(("dtype", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_load_infers_compute_dtype_from_weights(dtype, computed, tmp_path):
    folder = undeclared(tmp_path / "x", PUBLISHED, dtype=dtype)
    loaded = LVM.load(folder)
    assert loaded.config.dtype == computed
    logits = loaded.logits(np.arange(20)[None])
    wide = undeclared(tmp_path / "wide", PUBLISHED, dtype=dtype)
    models.write(tmp_path / "wider", with_dtype(models.read(wide), "float32"), "hf")
    np.testing.assert_array_equal(LVM.load(tmp_path / "wider", dtype=computed).logits(np.arange(20)[None]), logits)


@pytest.mark.parametrize("tied", [False, True])
def test_parametrized_model_is_exported_as_plain_one(tmp_path, tied):
    parametrization = ParametrizationConfig("completep", 4, 1, 4)
    config = small_config(parametrization=parametrization, tie_embeddings=tied, init_std=0.5)
    make = lambda rngs: Transformer(config, rngs)  # noqa: E731
    params = jax.jit(lambda: init_params(make, jax.random.key(0)))()
    stacked = {name: np.asarray(array) for name, array in flatten_dict(params, sep=".").items()}
    arrays = {}
    for name in tensor_shapes(config):
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        arrays[name] = stacked[f"layers.{layer[2]}"][int(layer[1])] if layer else stacked[name]
    checkpoint = dataclasses.replace(
        small_model(), config=config, tensors={name: from_array(x) for name, x in arrays.items()}
    )
    tokens = np.arange(10)[None]
    module = merge(abstract_module(make)[0], params)
    expected = jax.jit(lambda tokens: module(tokens, tokens, "xla"))(tokens)
    for format in ("orbax", "hf"):
        models.write(tmp_path / format, checkpoint, format)
        assert models.read(tmp_path / format).config == config
    (tmp_path / "hf" / "lvm.json").unlink()  # a Llama folder of anyone, which has no parametrization
    assert models.read(tmp_path / "hf").config.parametrization == ParametrizationConfig()
    for format in ("orbax", "hf"):
        np.testing.assert_allclose(LVM.load(tmp_path / format).logits(tokens), expected, atol=1e-5)
