"""Models through folders: every chain of formats gives the same bits back, and what doesn't fit is named."""

import dataclasses
import json
import pickle
import tempfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common import files
from lvm.common.errors import UserError
from lvm.inference.pretrained import LVM
from lvm.interop import models
from lvm.interop.layouts import EASYLM, HUGGING_FACE
from lvm.interop.lazy_checkpoint import NO_RECORD, stacked_shapes, with_dtype
from lvm.model.vocabulary import Vocabulary
from lvm.training.checkpoint import open_params
from tests.lvm.small_models import (
    OURS,
    PUBLISHED,
    SMALL,
    assert_same_model,
    assert_same_tensors,
    small_config,
    small_model,
)

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("compiled_quickly")


@settings(max_examples=5)
@given(
    chain=st.lists(st.sampled_from(models.FORMATS), min_size=1, max_size=3),
    kv_heads=st.sampled_from([0, 1, 2]),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    vocabulary=st.sampled_from([SMALL, Vocabulary(16, 20, None, None, 16)]),
    max_shard_bytes=st.sampled_from([1, 5000, 10**9]),
)
def test_every_chain_of_formats_gives_the_same_bits(
    chain, kv_heads, tied, dtype, vocabulary, max_shard_bytes
):
    wanted = small_model(vocabulary, dtype, num_heads=4, num_kv_heads=kv_heads, tie_embeddings=tied)
    found = wanted
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(chain):
            models.write(f"{folder}/{number}", found, kind, max_shard_bytes)
            found = models.read(f"{folder}/{number}")
        assert_same_model(found, wanted)


def test_the_published_model_has_the_names_that_its_files_have():
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


# --- Hugging Face -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    models.write(tmp_path / "hf", small_model(OURS), "hf", 200_000)
    return tmp_path / "hf"


def edit(path, change):
    fields = files.read_json(path)
    change(fields)
    files.write_json(path, fields)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json: names model-00002-of-00003\.safetensors; not there"):
        models.read(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"shards of weights without model\.safetensors\.index\.json"):
        models.read(sharded)


def test_an_index_that_lies_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    edit(
        index,
        lambda fields: fields["weight_map"].update({"model.norm.bias": "model-00001-of-00003.safetensors"}),
    )
    with pytest.raises(
        UserError, match=r"names tensors that aren't in their files: model\.norm\.bias of model-00001"
    ):
        models.read(sharded)
    edit(index, lambda fields: fields["weight_map"].update({"model.norm.bias": "../secret"}))
    with pytest.raises(UserError, match=r"index\.json: names \.\./secret"):
        models.read(sharded)
    edit(index, lambda fields: fields.pop("weight_map"))
    with pytest.raises(UserError, match="no weight_map"):
        models.read(sharded)


def test_a_shard_cut_short_is_named(sharded):
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors: not a safetensors file"):
        models.read(sharded)


def test_wrong_shapes_and_missing_tensors_are_listed(sharded):
    edit(sharded / "config.json", lambda fields: fields.update(intermediate_size=32))
    with pytest.raises(
        UserError,
        match=r"9 of another shape .*layers\.0\.mlp\.gate_proj\.weight \[24, 16\], expected \[32, 16\]",
    ):
        models.read(sharded)
    edit(sharded / "config.json", lambda fields: fields.update(intermediate_size=24, num_hidden_layers=4))
    with pytest.raises(UserError, match=r"9 missing \(model\.layers\.3"):
        models.read(sharded)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: .*another network isn't built"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "expected rope_type 'default'"),
        ({"rope_theta": 5e5}, "rope_theta: 500000.0, but rope_parameters say 10000.0"),
        ({"attention_bias": True}, "attention_bias: True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', expected 'silu'"),
        ({"model_type": "mistral"}, "model_type: 'mistral', expected 'llama'"),
        ({"head_dim": 32}, "head_dim: 32, expected 8"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3 doesn't divide"),
        ({"hidden_size": "16"}, "hidden_size: '16' is a str"),
        ({"hidden_size": None}, "hidden_size: None"),
        ({"vocab_size": 8292}, r"vocabulary\.json: size: 8448, the model's vocabulary has 8292"),
    ],
)
def test_fields_of_another_network_are_named(change, words, sharded):
    edit(sharded / "config.json", lambda fields: fields.update(change))
    with pytest.raises(UserError, match=words):
        models.read(sharded)


def test_the_fields_of_either_transformers_are_enough(sharded):
    wanted = models.read(sharded)
    for gone in (("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")):
        path = sharded / "config.json"
        before = path.read_text()
        edit(path, lambda fields, gone=gone: [fields.pop(name) for name in gone])
        assert_same_model(models.read(sharded), wanted)
        path.write_text(before)


def undeclared(folder, vocabulary, **sizes):
    models.write(folder, small_model(vocabulary, **sizes), "hf")
    (folder / "vocabulary.json").unlink()
    (folder / "lvm.json").unlink()
    return folder


def test_two_sizes_of_vocabulary_are_known_undeclared(tmp_path):
    assert models.read(undeclared(tmp_path / "a", PUBLISHED)).vocabulary == PUBLISHED
    assert models.read(undeclared(tmp_path / "b", OURS)).vocabulary == OURS
    assert models.read(tmp_path / "b").record == NO_RECORD


def test_a_language_model_is_refused(tmp_path):
    folder = undeclared(tmp_path / "bpe", Vocabulary(32000, 32000, None, None, None))
    with pytest.raises(
        UserError, match=r"32000 ids and no vocabulary\.json .*8292 and 8448 .*language model's"
    ):
        models.read(folder)
    Vocabulary(31000, 32000, None, None, None).save(folder)  # who says so knows it
    assert models.read(folder).vocabulary.num_codes == 31000


def test_a_pickle_with_code_in_it_is_refused_and_nothing_is_run(tmp_path):
    folder = undeclared(tmp_path / "hf", OURS)
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"lm_head.weight": Attack()}, 2))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused, .*open; nothing of it was run"):
        models.read(folder)
    assert not ran.exists()


# --- Ours -------------------------------------------------------------------------------------------------------


def test_a_converted_workdir_is_whole_and_checked(tmp_path):
    wanted = small_model()
    record = {**NO_RECORD, "config": {"seed": 3}, "tokenizer": {"hash": "a"}, "stores": ["b"]}
    models.write(tmp_path / "x", dataclasses.replace(wanted, record=record), "orbax")
    found = models.read(tmp_path / "x")
    assert_same_model(found, wanted)
    assert found.record["tokenizer"] == {"hash": "a"}
    assert found.record["config"]["seed"] == 3
    with pytest.raises(UserError, match="no checkpoint of step 9; it has 7"):
        models.read(tmp_path / "x", 9)
    data = max((tmp_path / "x" / "checkpoints" / "7" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged checkpoint: .*checksum"):
        models.read(tmp_path / "x")


def test_a_layer_is_read_without_its_neighbours(tmp_path):
    models.write(tmp_path / "x", small_model(), "orbax")
    arrays = open_params(tmp_path / "x", 7, stacked_shapes(small_config()))
    assert {array.chunk_layout.read_chunk.shape[0] for name, array in arrays.items() if "layers" in name} == {
        1
    }


def test_layers_of_differing_types_ask_for_one(tmp_path):
    checkpoint = small_model()
    mixed = dict(checkpoint.tensors)
    mixed["layers.1.mlp.up"] = with_dtype(checkpoint, "bfloat16").tensors["layers.1.mlp.up"]
    mixed_model = dataclasses.replace(checkpoint, tensors=mixed)
    with pytest.raises(
        UserError, match=r"layers\.mlp\.up: its layers are stored in bfloat16, float32; .*--dtype"
    ):
        models.write(tmp_path / "x", mixed_model, "orbax")
    assert not (tmp_path / "x").exists()
    models.write(tmp_path / "x", with_dtype(mixed_model, "float32"), "orbax")


# --- Folders that are none --------------------------------------------------------------------------------------


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a model folder: config\.json is missing"):
        models.read(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQGANModel"}))
    with pytest.raises(UserError, match="_class_name: 'VQGANModel': a tokenizer's"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "tokenizer"}))
    with pytest.raises(UserError, match="holds 'tokenizer', expected the workdir of a model of kind 'lvm'"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8292}))
    with pytest.raises(UserError, match="weights: none; wanted"):
        models.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list; expected an object"):
        models.read(tmp_path)


def test_a_step_is_of_workdirs_alone(tmp_path):
    models.write(tmp_path / "x", small_model(), "hf")
    with pytest.raises(UserError, match="a step is chosen of a workdir's checkpoints"):
        models.read(tmp_path / "x", 3)
    with pytest.raises(UserError, match=r"model\.safetensors: a file of weights; give its folder"):
        models.read(tmp_path / "x" / "model.safetensors")


def test_a_damaged_record_is_named(tmp_path):
    models.write(tmp_path / "x", small_model(), "hf")
    (tmp_path / "x" / "lvm.json").write_text("{}")
    with pytest.raises(UserError, match=r"lvm\.json: expected record, .* remove it"):
        models.read(tmp_path / "x")
    (tmp_path / "x" / "lvm.json").unlink()
    assert_same_tensors(models.read(tmp_path / "x"), small_model())


def test_every_folder_is_loaded_alike(tmp_path):
    checkpoint = small_model(num_heads=4, num_kv_heads=2)
    tokens = np.random.default_rng(0).integers(0, SMALL.size, (2, 32))
    answers = []
    for kind in models.FORMATS:
        models.write(tmp_path / kind, checkpoint, kind)
        loaded = LVM.load(tmp_path / kind)
        config = dataclasses.replace(
            checkpoint.config, attention="auto"
        )  # training's kernel need not run here
        assert (loaded.config, loaded.vocabulary, loaded.step) == (config, SMALL, 7)
        answers.append(loaded.logits(tokens))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.parametrize(("dtype", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_published_weights_compute_as_they_are_stored(dtype, computed, tmp_path):
    folder = undeclared(tmp_path / "x", PUBLISHED, dtype=dtype)
    found = LVM.load(folder)
    assert found.config.dtype == computed
    logits = found.logits(np.arange(20)[None])
    wide = undeclared(tmp_path / "wide", PUBLISHED, dtype=dtype)
    models.write(tmp_path / "wider", with_dtype(models.read(wide), "float32"), "hf")
    np.testing.assert_array_equal(
        LVM.load(tmp_path / "wider", dtype=computed).logits(np.arange(20)[None]), logits
    )
