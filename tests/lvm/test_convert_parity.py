"""Exports in transformers: logits at late positions, greedy generation, and the example script.

Run by `make test-parity` with transformers 5, and by `make test-compat` with transformers 4.
"""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from lvm.convert import convert
from lvm.inference.pretrained import LVM
from lvm.inference.sampling import SamplingParams
from lvm.interop import models
from lvm.interop.lazy_checkpoint import resize_vocabulary
from lvm.model.vocabulary import Vocabulary
from tests.lvm.small_models import OURS, PUBLISHED, SMALL, assert_same_tensors, small_model
from tests.tokenizer.networks import random_weights, small
from tokenizer import Tokenizer, weights

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

T = 4001
POSITIONS = [0, 1, 100, 1000, 4000]

vocabularies = pytest.mark.parametrize("vocabulary", [PUBLISHED, OURS], ids=["8292", "8448"])
tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
grouped = pytest.mark.parametrize("kv_heads", [0, 2], ids=["all heads", "grouped"])


def exported(folder, vocabulary, tied=False, kv_heads=0, **options):
    checkpoint = small_model(
        vocabulary,
        hidden_size=64,
        mlp_size=96,
        num_heads=4,
        num_kv_heads=kv_heads,
        tie_embeddings=tied,
        context=T,
    )
    models.write(folder, checkpoint, "hf", **options)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    return checkpoint, theirs


@vocabularies
@tied
@grouped
def test_logits_match_at_late_positions(vocabulary, tied, kv_heads, tmp_path):
    checkpoint, theirs = exported(tmp_path / "hf", vocabulary, tied, kv_heads, max_shard_bytes=10**6)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    models.write(tmp_path / "ours", checkpoint, "orbax")
    tokens = np.random.default_rng(1).integers(0, vocabulary.size, (1, T))
    with torch.no_grad():
        hidden = theirs.model(torch.from_numpy(tokens), use_cache=False).last_hidden_state
        expected = theirs.lm_head(hidden[:, POSITIONS]).numpy()
    assert expected.std() > 0.5
    loaded = LVM.load(tmp_path / "ours").logits(tokens)[:, POSITIONS]
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=1e-4)


@vocabularies
@grouped
def test_greedy_generation_matches(vocabulary, kv_heads, tmp_path):
    _, theirs = exported(tmp_path / "hf", vocabulary, kv_heads=kv_heads)
    prompt = np.random.default_rng(2).integers(0, vocabulary.num_codes, (1, 300))
    if vocabulary.bos is not None:
        prompt[0, 0] = vocabulary.bos
    ids = torch.from_numpy(prompt)
    with torch.no_grad():
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=256,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = output.sequences[0, prompt.shape[1] :].numpy()
    assert len(expected) == 256
    assert expected.max() < vocabulary.num_codes
    loaded = LVM.load(tmp_path / "hf").generate_tokens(prompt, 256, SamplingParams(0.0), codes_only=True)[0]
    different = np.flatnonzero(loaded != expected)
    if len(different):
        scores = np.sort(output.logits[different[0]][0, : vocabulary.num_codes].numpy())
        assert scores[-1] - scores[-2] < 1e-4, (
            f"the {different[0]}th code: {loaded[different[0]]}, there {expected[different[0]]}"
        )


@vocabularies
def test_text_pipeline_gives_our_codes(vocabulary, tmp_path):
    """Through the exported tokenizer: codes in decimal, BOS where the model has one."""
    models.write(tmp_path / "hf", small_model(vocabulary, context=64), "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = [*([] if vocabulary.bos is None else [vocabulary.bos]), 17, 4, 8191]
    assert tokenizer("17 4 8191").input_ids == prompt
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "17 4 8191"
    assert len(tokenizer) == vocabulary.size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        vocabulary.bos, vocabulary.eos, vocabulary.pad
    )  # fmt: skip
    with pytest.raises(Exception, match="UNK"):
        tokenizer("a word")
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    text = generate("17 4 8191", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    ours = LVM.load(tmp_path / "hf").generate_tokens(np.array([prompt]), 12, SamplingParams(0.0), codes_only=True)[0]
    assert [int(word) for word in text.split()] == ours.tolist()


def test_generation_config_has_special_ids(tmp_path):
    _, theirs = exported(tmp_path / "hf", OURS)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (8192, 8193, 8194)
    assert theirs.generation_config.suppress_tokens == list(range(8192, 8448))
    _, theirs = exported(tmp_path / "published", PUBLISHED)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, 8192)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_read_what_transformers_saves(theta, tmp_path):
    """Weights saved again by transformers, with the fields of its version and none of our files."""
    checkpoint = small_model(SMALL, num_heads=4, num_kv_heads=2, rope_theta=theta)
    models.write(tmp_path / "hf", checkpoint, "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert ("rope_parameters" in fields) or ("rope_theta" in fields)
    loaded = models.read(tmp_path / "saved")
    assert_same_tensors(loaded, checkpoint)
    assert loaded.vocabulary == SMALL
    assert dataclasses.replace(loaded.config, attention="xla") == checkpoint.config
    torch.save(theirs.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    (tmp_path / "saved" / "model.safetensors").unlink()
    assert_same_tensors(models.read(tmp_path / "saved"), checkpoint)


def test_resized_vocabulary_keeps_logits(tmp_path):
    checkpoint, _ = exported(tmp_path / "hf", PUBLISHED)
    models.write(tmp_path / "resized", resize_vocabulary(checkpoint, 8448), "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "resized")
    tokens = np.random.default_rng(1).integers(0, 8192, (1, 200))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits[..., :8192].numpy()
    loaded = LVM.load(tmp_path / "hf").logits(tokens)[..., :8192]
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["squash", "center_crop"])
def test_example_script_matches_our_generation(mode, tmp_path):
    """Runs example.py as a user would, on image files."""
    pytest.importorskip("diffusers")
    network = small("lvm", resolution=32, codebook_size=64)
    weights.write(tmp_path / "tokenizer", random_weights(network, mode=mode), "orbax")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    checkpoint = small_model(Vocabulary.for_codes(64), num_heads=2, context=64)
    record = {**checkpoint.record, "tokenizer": tokenizer.identity()}
    models.write(tmp_path / "run", dataclasses.replace(checkpoint, record=record), "orbax")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", tokenizer=str(tmp_path / "tokenizer"))
    rng = np.random.default_rng(3)
    names = [tmp_path / f"{name}.png" for name in ("x", "y", "query")]
    for name in names:
        colors = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        PIL.Image.fromarray(colors).resize((90, 60), PIL.Image.Resampling.BILINEAR).save(name)
    out = tmp_path / "answer.png"
    process = subprocess.run(
        [sys.executable, tmp_path / "hf" / "example.py", *names, out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    grids = tokenizer.encode(np.stack([tokenizer.read_image(name) for name in names]))
    answer = LVM.load(tmp_path / "hf").generate(grids[None], 1, temperature=0.0)[0]
    expected = tokenizer.decode(answer)[0].astype(int)
    assert expected.std() > 5
    assert np.abs(np.asarray(PIL.Image.open(out)).astype(int) - expected).max() <= 1
    lines = (tmp_path / "hf" / "example.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30
