"""The command that converts: what it says, what it refuses, what it leaves behind, and what it needs."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from lvm import convert
from lvm.common import files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.interop import models
from lvm.interop.init_from import load_initial_model
from lvm.interop.lazy_checkpoint import stacked_shapes
from lvm.model.vocabulary import Vocabulary
from lvm.train import train
from lvm.training.checkpoint import open_params
from lvm.training.config import TrainConfig
from tests.commands import run, start
from tests.configs import tiny_lvm
from tests.lvm.small_models import OURS, PUBLISHED, assert_same_tensors, small_config, small_model
from tests.tokenizer.networks import check_same, random_weights, small
from tokenizer import Tokenizer, weights

pytest.importorskip("safetensors")
TOKENIZER = small("lvm", resolution=32, codebook_size=64)


@pytest.fixture
def source(tmp_path):
    models.write(tmp_path / "source", small_model(PUBLISHED), "easylm")
    return tmp_path / "source"


def test_the_command_converts_and_checks(source, tmp_path):
    said = run("lvm.convert", source, tmp_path / "hf", "--to", "hf", "--vocabulary=8448", "--dtype=bfloat16")
    assert "no tokenizer/ and no example.py" in said
    assert "parameters in bfloat16, 8192 codes of 8448 ids, step 7" in said
    assert models.read(tmp_path / "hf").vocabulary == dataclasses.replace(PUBLISHED, size=8448)
    with pytest.raises(UserError, match="exists and isn't an empty folder"):
        convert.convert(str(source), str(tmp_path / "hf"), "hf")
    with pytest.raises(UserError, match="nowhere: not a model folder"):
        convert.convert(str(tmp_path / "nowhere"), str(tmp_path / "x"), "hf")
    assert "--to: missing" in run("lvm.convert", source, tmp_path / "x", code=2)
    equal = run("lvm.convert", "--check", source, source, "--rows=1")
    assert "on 1 rows of 32 random codes" in equal
    assert "first layer that differs: none" in equal
    apart = run("lvm.convert", "--check", source, tmp_path / "hf", code=1)
    assert "largest difference of a logit: 0.0" in apart
    assert "first layer that differs: embedding" in apart
    assert convert.check(str(source), str(tmp_path / "hf"), rows=1, tolerance=1.0)
    assert not (tmp_path / "x").exists()


def no_large_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("kind", ["hf", "orbax", pytest.param("easylm", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_nothing(kind, source, tmp_path):
    process = start("lvm.convert", source, tmp_path / "out", f"--to={kind}", preexec_fn=no_large_files)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.splitlines()[-1].startswith("error: File too large"), output
    assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- What stands beside an export -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model and the tokenizer that its record tells."""
    tmp_path = tmp_path_factory.mktemp("trained")
    weights.write(tmp_path / "tokenizer", random_weights(TOKENIZER), "torch")
    identity = Tokenizer.load(tmp_path / "tokenizer").identity()
    checkpoint = small_model(Vocabulary.for_codes(64))
    record = {**checkpoint.record, "tokenizer": identity, "config": {"seed": 3, "batch_size": 96}}
    models.write(tmp_path / "run", dataclasses.replace(checkpoint, record=record), "orbax")
    return tmp_path


def test_an_export_tells_what_it_is(trained, tmp_path):
    out = tmp_path / "hf"
    convert.convert(str(trained / "run"), str(out), "hf", tokenizer=str(trained / "tokenizer"))
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "example.py", "generation_config.json", "lvm.json", "model.safetensors",
        "tokenizer", "vocabulary.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    identity = Tokenizer.load(trained / "tokenizer").identity()
    count = sum(tensor.read().size for tensor in models.read(out).tensors.values())
    for words in (
        f"{count:,}",
        identity["hash"],
        identity["weights"],
        "BOS 64, EOS 65, PAD 66",
        '"batch_size": 96',
    ):
        assert words in card
    assert "2 × 2 an image" in card
    check_same(weights.read(out / "tokenizer"), weights.read(trained / "tokenizer"))
    compile((out / "example.py").read_text(), "example.py", "exec")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 64, "eos_token_id": 65, "pad_token_id": 66, "suppress_tokens": list(range(64, 320))
    }  # fmt: skip
    assert models.read(out).record["tokenizer"] == files.as_json(identity)


def test_a_tokenizer_that_is_not_the_models_is_refused(trained, caplog):
    weights.write(trained / "other", random_weights(TOKENIZER, seed=1), "torch")
    with pytest.raises(UserError, match="other: not the tokenizer that the model was trained with"):
        convert.convert(str(trained / "run"), str(trained / "hf"), "hf", tokenizer=str(trained / "other"))
    models.write(trained / "untold", small_model(Vocabulary.for_codes(32)), "hf")
    with pytest.raises(UserError, match="a tokenizer of 64 codes, the model has 32"):
        convert.convert(str(trained / "untold"), str(trained / "hf"), "hf", tokenizer=str(trained / "other"))
    with pytest.raises(UserError, match=r"goes beside the weights of --to=hf alone, not of orbax"):
        convert.convert(str(trained / "run"), str(trained / "hf"), "orbax", tokenizer=str(trained / "other"))
    assert not (trained / "hf").exists()
    assert not list(trained.glob(".*"))
    models.write(trained / "told by nothing", small_model(Vocabulary.for_codes(64)), "easylm")
    convert.convert(
        str(trained / "told by nothing"), str(trained / "hf"), "hf", tokenizer=str(trained / "other")
    )
    assert "this one is taken on trust" in caplog.text


def test_a_tokenizer_of_another_network_has_no_layout_for_an_export(trained):
    own = random_weights(small("maskgit", resolution=32, codebook_size=64))
    weights.write(trained / "maskgit", own, "maskgit")
    models.write(trained / "any", small_model(Vocabulary.for_codes(64)), "hf")
    with pytest.raises(UserError, match="variant maskgit has no layout 'diffusers'"):
        convert.convert(str(trained / "any"), str(trained / "x"), "hf", tokenizer=str(trained / "maskgit"))
    assert not (trained / "x").exists()


# --- Going on ---------------------------------------------------------------------------------------------------


def test_what_training_can_begin_with(tmp_path):
    models.write(tmp_path / "x", small_model(PUBLISHED, "bfloat16"), "hf")
    config = small_config(OURS)
    found = load_initial_model(tmp_path / "x", config, OURS, {"hash": "a"})
    assert found.dtype == "float32"
    assert found.tensors["embedding"].shape == (8448, 16)
    for change, words in (
        ({"mlp_size": 32}, "config.model.mlp_size: 32, there 24"),
        ({"num_kv_heads": 1}, "config.model.kv_heads: 1, there 2"),
        ({"tie_embeddings": True}, "config.model.tie_embeddings: True, there False"),
    ):
        with pytest.raises(UserError, match=f"config.init_from: .*another model .*{words}"):
            load_initial_model(tmp_path / "x", dataclasses.replace(config, **change), OURS, {"hash": "a"})
    with pytest.raises(UserError, match="codes: 512, there 8192"):
        load_initial_model(tmp_path / "x", config, Vocabulary.for_codes(512), {"hash": "a"})
    told = dataclasses.replace(
        small_model(OURS), record={**small_model(OURS).record, "tokenizer": {"hash": "b"}}
    )
    models.write(tmp_path / "told", told, "easylm")
    with pytest.raises(UserError, match="a model of another tokenizer's codes"):
        load_initial_model(tmp_path / "told", config, OURS, {"hash": "a"})


@pytest.mark.slow
def test_training_goes_on_from_any_folder(demo, tmp_path, caplog):
    """With a learning rate of nothing, what it begins with is what comes out: from a smaller vocabulary, sharded."""
    tiny = tiny_lvm.get_config()
    tiny.data.store = str(demo / "store")
    tiny.optimizer.update({"learning_rate": 1e-30, "end_learning_rate": 1e-30, "warmup_steps": 1})
    tiny.loop.total_steps = 2
    tiny.update({"batch_size": 8, "tokenizer": ""})
    tiny.mesh.update({"fsdp": 4, "data": 2})
    trained = models.read(demo / "lvm")
    small_vocabulary = trained.vocabulary.num_codes + 100
    for kind in models.FORMATS:
        convert.convert(str(demo / "lvm"), str(tmp_path / kind), kind, vocabulary_size=small_vocabulary)
        tiny.init_from = str(tmp_path / kind)
        train(from_config_dict(TrainConfig, tiny), str(tmp_path / f"from {kind}"))
        found = models.read(tmp_path / f"from {kind}")
        assert found.step == 2
        for name, tensor in trained.tensors.items():
            rows, wanted = found.tensors[name].read(), tensor.read()
            if name == "head":
                rows, wanted = rows.T, wanted.T
            kept = small_vocabulary if name in ("embedding", "head") else len(wanted)
            np.testing.assert_array_equal(rows[:kept], wanted[:kept])
    arrays = open_params(tmp_path / "from hf", 2, stacked_shapes(trained.config))
    assert arrays["layers.mlp.up"].chunk_layout.read_chunk.shape[0] == 1  # so that a layer is read by itself
    assert "its vocabulary becomes ours" in caplog.text
    with pytest.raises(
        UserError, match=r"converted weights and no training; start one .*--config\.init_from"
    ):
        train(from_config_dict(TrainConfig, tiny), str(tmp_path / "orbax"))


@pytest.mark.slow
def test_an_export_is_asked_and_evaluated_like_its_run(demo, tmp_path):
    """And resized, and without its record: then evaluation is told what to ask."""
    convert.convert(str(demo / "lvm"), str(tmp_path / "hf"), "hf", vocabulary_size=800)
    image = tmp_path / "a.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
    answers = []
    for name, model in (("run", demo / "lvm"), ("hf", tmp_path / "hf")):
        shared = [f"--model={model}", f"--tokenizer={demo / 'tokenizer'}", f"--out={tmp_path / name}.png"]
        run("lvm.prompt", *shared, "--sequence", image, image)
        answers.append((tmp_path / f"{name}.png").read_bytes())
    assert answers[0] == answers[1]
    common = ["--config=tests/configs/tiny_eval.py", f"--tokenizer={demo / 'tokenizer'}"]
    run("lvm.evaluate", *common, f"--model={tmp_path / 'hf'}", f"--out={tmp_path / 'told'}")
    (tmp_path / "hf" / "lvm.json").unlink()
    untold = [*common, f"--model={tmp_path / 'hf'}", f"--out={tmp_path / 'untold'}", "--config.unseen=true"]
    assert "config.data.components: empty, and" in run("lvm.evaluate", *untold, code=2)
    assert "taken on trust" in run("lvm.prompt", *shared, "--sequence", image, image)


# --- Memory -----------------------------------------------------------------------------------------------------


MEASURE = """
import resource, sys
from lvm import convert, files
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert.convert(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_bytes=10**8)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["hf orbax", "orbax hf", "orbax easylm", "easylm orbax"])
def test_memory_stays_that_of_a_tensor(chain, tmp_path):
    """A model of 1.2 GB, whose largest stacked tensor is 0.3 GB and whose largest layer is 19 MB."""
    origin, kind = chain.split()
    sizes = {"hidden_size": 1024, "mlp_size": 4608, "num_layers": 16, "num_heads": 8, "context": 64}
    models.write(tmp_path / "source", small_model(**sizes), origin)
    total = sum(tensor.nbytes for tensor in small_model(**sizes).tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "out", kind],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    largest = 16 * 1024 * 4608 * 4 if kind == "orbax" else 10**8
    used = int(done.stdout.splitlines()[-1])
    assert used < 5 * 10**8 + 2 * largest
    assert used < total
    assert_same_tensors(models.read(tmp_path / "out"), models.read(tmp_path / "source"))
