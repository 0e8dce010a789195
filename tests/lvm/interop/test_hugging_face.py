"""Folders of transformers' Llama: shards, fields, names, vocabularies, and the tokenizer that is written for them."""

import pickle
import zipfile

import pytest

from lvm.common import files
from lvm.common.errors import UserError
from lvm.interop import models
from lvm.interop.lazy_checkpoint import NO_RECORD
from lvm.interop.tensors import read_safetensors, write_safetensors
from lvm.model.vocabulary import Vocabulary
from tests.lvm.small_models import OURS, PUBLISHED, SMALL, assert_same_model, small_model, undeclared

pytest.importorskip("safetensors")


@pytest.fixture
def sharded(tmp_path):
    models.write(tmp_path / "hf", small_model(OURS), "hf", 200_000)
    return tmp_path / "hf"


def edit(path, change):
    fields = files.read_json(path)
    change(fields)
    files.write_json(path, fields)


def test_read_hf_names_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json: .*model-00002-of-00003\.safetensors"):
        models.read(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"hf: .*model\.safetensors\.index\.json"):
        models.read(sharded)


def test_read_hf_rejects_inconsistent_index(sharded):
    index = sharded / "model.safetensors.index.json"
    edit(
        index,
        lambda fields: fields["weight_map"].update({"model.norm.bias": "model-00001-of-00003.safetensors"}),
    )
    with pytest.raises(UserError, match=r"index\.json: .*model\.norm\.bias in model-00001"):
        models.read(sharded)
    edit(index, lambda fields: fields["weight_map"].update({"model.norm.bias": "../secret"}))
    with pytest.raises(UserError, match=r"index\.json: .*\.\./secret"):
        models.read(sharded)
    edit(index, lambda fields: fields["weight_map"].update({"model.norm.bias": 3}))
    with pytest.raises(UserError, match="no weight_map"):
        models.read(sharded)
    edit(index, lambda fields: fields.pop("weight_map"))
    with pytest.raises(UserError, match="no weight_map"):
        models.read(sharded)


def test_read_hf_names_truncated_shard(sharded):
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors: not a readable"):
        models.read(sharded)


def test_read_hf_lists_misshapen_and_missing_tensors(sharded):
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
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: .*llama3.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "expected rope_type 'default'"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_parameters: .*linear.* is not supported"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "expected partial_rotary_factor 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 .*expected 1.0"),
        ({"rope_theta": 5e5}, "rope_theta: 500000.0, but .*10000.0"),
        ({"attention_bias": True}, "attention_bias: True .*expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' .*expected 'silu'"),
        ({"model_type": "mistral"}, "model_type: 'mistral' .*expected 'llama'"),
        ({"head_dim": 32}, "head_dim: 32 .* 8"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"hidden_size": "16"}, "hidden_size: '16' is a str"),
        ({"hidden_size": None}, "hidden_size: None"),
        ({"vocab_size": 8292}, r"vocabulary\.json: size: 8448, the model's vocabulary has 8292"),
    ],
)
def test_read_hf_rejects_fields_of_other_networks(change, message, sharded):
    edit(sharded / "config.json", lambda fields: fields.update(change))
    with pytest.raises(UserError, match=message):
        models.read(sharded)


def test_read_hf_accepts_fields_of_transformers_4_and_5(sharded):
    expected = models.read(sharded)
    for missing in (("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")):
        path = sharded / "config.json"
        before = path.read_text()
        edit(path, lambda fields, missing=missing: [fields.pop(name) for name in missing])
        assert_same_model(models.read(sharded), expected)
        path.write_text(before)


@pytest.mark.parametrize(
    "scaling", [None, {}, {"type": "default"}, {"rope_type": "default", "type": "default", "factor": 1.0}]
)
def test_read_hf_takes_default_rope_scaling_as_plain(scaling, sharded):
    expected = models.read(sharded)
    edit(sharded / "config.json", lambda fields: fields.update(rope_scaling=scaling))
    assert_same_model(models.read(sharded), expected)


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [("module.", ""), ("module._orig_mod.", ""), ("model.", ""), ("vqgan.", ""), ("", "_orig_mod.")],
)
def test_read_hf_drops_prefixes_of_wrappers(prefix, layer, sharded, caplog):
    def rename(name):
        return prefix + name.replace("layers.0.", f"layers.0.{layer}")

    for path in sharded.glob("*.safetensors"):
        write_safetensors(path, {rename(name): tensor.read() for name, tensor in read_safetensors(path).items()})
    edit(
        sharded / "model.safetensors.index.json",
        lambda fields: fields.update(weight_map={rename(name): file for name, file in fields["weight_map"].items()}),
    )
    with caplog.at_level("INFO", "lvm"):
        assert_same_model(models.read(sharded), small_model(OURS))
    assert "names are read without their wrapper's prefix" in caplog.text


def test_read_knows_two_undeclared_vocabularies(tmp_path):
    assert models.read(undeclared(tmp_path / "a", PUBLISHED)).vocabulary == PUBLISHED
    assert models.read(undeclared(tmp_path / "b", OURS)).vocabulary == OURS
    assert models.read(tmp_path / "b").record == NO_RECORD


@pytest.mark.parametrize("vocabulary", [SMALL, Vocabulary(20, 24, None, 21, 23), PUBLISHED, OURS])
def test_read_takes_vocabulary_from_generation_config(vocabulary, tmp_path):
    """As transformers saves a fine-tuned export: without our files, and without ids that are None."""
    folder = undeclared(tmp_path / "x", vocabulary)
    edit(
        folder / "generation_config.json",
        lambda fields: [fields.pop(name) for name, value in list(fields.items()) if value is None],
    )
    assert models.read(folder).vocabulary == vocabulary
    if vocabulary == SMALL:
        edit(folder / "generation_config.json", lambda fields: fields.update(suppress_tokens=[3, 7]))
        with pytest.raises(UserError, match=r"272 ids without a vocabulary\.json"):
            models.read(folder)


def test_read_recognizes_adapters(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(UserError, match=r"an adapter.*merge_and_unload"):
            models.read(path)


def test_read_rejects_language_model(tmp_path):
    folder = undeclared(tmp_path / "bpe", Vocabulary(32000, 32000, None, None, None))
    with pytest.raises(UserError, match=r"32000 ids without a vocabulary\.json; .*8292 and 8448"):
        models.read(folder)
    Vocabulary(31000, 32000, None, None, None).save(folder)  # declared
    assert models.read(folder).vocabulary.num_codes == 31000


def test_read_hf_of_tied_model_ignores_a_second_copy(tmp_path):
    expected = small_model(tie_embeddings=True)
    models.write(tmp_path / "hf", expected, "hf")
    weights = {name: tensor.read() for name, tensor in read_safetensors(tmp_path / "hf" / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_safetensors(tmp_path / "hf" / "model.safetensors", weights)
    assert_same_model(models.read(tmp_path / "hf"), expected)


def test_check_tokenizer_compares_hash_and_codes(caplog):
    identity = {"hash": "a", "num_codes": 16}
    models.check_tokenizer({"hash": "a"}, SMALL, identity, "folder")
    assert not caplog.text
    models.check_tokenizer(None, SMALL, identity, "folder")
    assert "folder: can't be verified" in caplog.text
    with pytest.raises(UserError, match=r"folder: not the tokenizer .* \(preprocess\.mode: squash → center_crop\)$"):
        models.check_tokenizer(
            {"hash": "b", "num_codes": 16, "preprocess": {"mode": "squash", "filter": "bicubic"}}, SMALL,
            identity | {"preprocess": {"mode": "center_crop", "filter": "bicubic"}}, "folder",
        )  # fmt: skip
    models.check_tokenizer({"hash": "b", "codes": "c"}, SMALL, identity | {"codes": "c"}, "folder")  # a tuned decoder
    for expected in ({"hash": "a", "codes": "c"}, {"hash": "b"}):
        with pytest.raises(UserError, match="folder: not the tokenizer"):
            models.check_tokenizer(expected, SMALL, identity | {"codes": "d"}, "folder")
    for expected in (None, {"hash": "a"}):
        with pytest.raises(UserError, match="folder: 17 codes, but the model has 16"):
            models.check_tokenizer(expected, SMALL, {**identity, "num_codes": 17}, "folder")


def test_read_hf_refuses_pickle_with_code(tmp_path):
    folder = undeclared(tmp_path / "hf", OURS)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"lm_head.weight": Attack()}, 2))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused: .*open"):
        models.read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("bos", [3, None])
def test_written_hf_has_a_tokenizer_of_decimal_codes(bos, tmp_path):
    models.write(tmp_path / "x", small_model(Vocabulary(3, 7, bos, 5, None)), "hf")
    content, fields = (files.read_json(tmp_path / "x" / f"tokenizer{name}.json") for name in ("", "_config"))
    words = ["0", "1", "2", "<3>" if bos is None else "<bos>", "<4>", "<eos>", "<6>"]
    assert content["model"]["vocab"] == {word: i for i, word in enumerate(words)}
    assert content["model"]["unk_token"] not in words  # any other word is an error
    specials = {"<eos>": 5} | ({} if bos is None else {"<bos>": 3})
    assert {token["content"]: token["id"] for token in content["added_tokens"]} == specials
    for token in content["added_tokens"]:
        flags = {name: value for name, value in token.items() if name not in ("content", "id")}
        assert flags == {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first, *_ = content["post_processor"]["single"]
    assert first == (
        {"Sequence": {"id": "A", "type_id": 0}} if bos is None else {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    )
    assert (fields.get("bos_token"), fields["eos_token"], fields["model_max_length"]) == (
        words[3] if bos else None,
        "<eos>",
        32,
    )
