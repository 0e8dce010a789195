"""`lvm convert`: outputs, errors, what exports contain, training from a converted model, and peak memory."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import lvm
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


def test_convert_command_converts_and_checks(source, tmp_path):
    output = run("lvm.convert", source, tmp_path / "hf", "--to", "hf", "--vocabulary=8448", "--dtype=bfloat16")
    assert "--tokenizer" in output
    assert "parameters in bfloat16, 8192 codes of 8448 ids, step 7" in output
    assert models.read(tmp_path / "hf").vocabulary == dataclasses.replace(PUBLISHED, size=8448)
    with pytest.raises(UserError, match="hf: exists"):
        convert.convert(str(source), str(tmp_path / "hf"), "hf")
    with pytest.raises(UserError, match="nowhere: doesn't exist; expected a workdir of lvm"):
        convert.convert(str(tmp_path / "nowhere"), str(tmp_path / "x"), "hf")
    assert "--to is missing" in run("lvm.convert", source, tmp_path / "x", code=2)
    equal = run("lvm.convert", "--check", source, source, "--rows=1")
    assert "on 1 rows of 32 random codes" in equal
    assert "first difference: none" in equal
    different = run("lvm.convert", "--check", source, tmp_path / "hf", code=1)
    assert "max logit difference: 0.0" in different
    assert "first difference: embedding" in different
    assert convert.check(str(source), str(tmp_path / "hf"), num_rows=1, tolerance=1.0)
    assert not (tmp_path / "x").exists()


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("format", ["hf", "orbax", pytest.param("easylm", marks=pytest.mark.slow)])
def test_convert_command_full_disk_leaves_nothing(format, source, tmp_path):
    process = start("lvm.convert", source, tmp_path / "out", f"--to={format}", preexec_fn=limit_file_size)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.splitlines()[-1].startswith("error: File too large"), output
    assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- Contents of an export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small model and the tokenizer in its run record."""
    tmp_path = tmp_path_factory.mktemp("trained")
    weights.write(tmp_path / "tokenizer", random_weights(TOKENIZER), "torch")
    identity = Tokenizer.load(tmp_path / "tokenizer").identity()
    checkpoint = small_model(Vocabulary.for_codes(64))
    record = {**checkpoint.record, "tokenizer": identity, "config": {"seed": 3, "batch_size": 96}}
    models.write(tmp_path / "run", dataclasses.replace(checkpoint, record=record), "orbax")
    return tmp_path


def test_convert_hf_writes_card_example_and_tokenizer(trained, tmp_path):
    out = tmp_path / "hf"
    convert.convert(str(trained / "run"), str(out), "hf", tokenizer=str(trained / "tokenizer"))
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "example.py", "generation_config.json", "lvm.json", "model.safetensors",
        "tokenizer", "tokenizer.json", "tokenizer_config.json", "vocabulary.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    identity = Tokenizer.load(trained / "tokenizer").identity()
    count = sum(tensor.read().size for tensor in models.read(out).tensors.values())
    for text in (
        f"{count:,}",
        identity["hash"],
        identity["weights"],
        "BOS 64, EOS 65, PAD 66",
        '\n "batch_size": 96',
        "do_sample=True, top_k=0",
        "| 2, 2, 8 |",
    ):
        assert text in card
    assert "2 × 2 an image" in card
    assert "Flash attention" not in card
    assert "do_sample=True, top_k=0" in (out / "example.py").read_text()
    check_same(weights.read(out / "tokenizer"), weights.read(trained / "tokenizer"))
    compile((out / "example.py").read_text(), "example.py", "exec")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 64, "eos_token_id": 65, "pad_token_id": 66, "suppress_tokens": list(range(64, 320))
    }  # fmt: skip
    assert models.read(out).record["tokenizer"] == files.as_json(identity)
    exported = json.loads((out / "lvm.json").read_text())
    assert exported["record"].pop("lvm_version") == lvm.__version__
    (out / "lvm.json").write_text(json.dumps(exported))  # exports of older versions lack it
    assert models.read(out).record["tokenizer"] == files.as_json(identity)


def test_model_card_names_heads_that_flash_attention_refuses(tmp_path):
    models.write(tmp_path / "run", small_model(hidden_size=200), "easylm")
    convert.convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    assert "takes head dims that are multiples of 8, and refuses 100" in (tmp_path / "hf" / "README.md").read_text()


def test_convert_rejects_another_tokenizer(trained, caplog):
    weights.write(trained / "other", random_weights(TOKENIZER, seed=1), "torch")
    with pytest.raises(UserError, match="other: not the tokenizer"):
        convert.convert(str(trained / "run"), str(trained / "hf"), "hf", tokenizer=str(trained / "other"))
    models.write(trained / "unrecorded", small_model(Vocabulary.for_codes(32)), "hf")
    with pytest.raises(UserError, match="other: 64 codes, but the model has 32"):
        convert.convert(str(trained / "unrecorded"), str(trained / "hf"), "hf", tokenizer=str(trained / "other"))
    with pytest.raises(UserError, match=r"--tokenizer=.*other is only supported with --to=hf, not --to=orbax"):
        convert.convert(str(trained / "run"), str(trained / "hf"), "orbax", tokenizer=str(trained / "other"))
    assert not (trained / "hf").exists()
    assert not list(trained.glob(".*"))
    models.write(trained / "unrecorded 64", small_model(Vocabulary.for_codes(64)), "easylm")
    convert.convert(str(trained / "unrecorded 64"), str(trained / "hf"), "hf", tokenizer=str(trained / "other"))
    assert "other: can't be verified" in caplog.text


def test_convert_rejects_tokenizer_without_diffusers_layout(trained):
    own = random_weights(small("maskgit", resolution=32, codebook_size=64))
    weights.write(trained / "maskgit", own, "maskgit")
    models.write(trained / "any", small_model(Vocabulary.for_codes(64)), "hf")
    with pytest.raises(UserError, match="variant maskgit has no layout 'diffusers'"):
        convert.convert(str(trained / "any"), str(trained / "x"), "hf", tokenizer=str(trained / "maskgit"))
    assert not (trained / "x").exists()


# --- Training from a model folder -------------------------------------------------------------------------------


def test_load_initial_model_checks_architecture_and_codes(tmp_path):
    models.write(tmp_path / "x", small_model(PUBLISHED, "bfloat16"), "hf")
    config = small_config(OURS)
    loaded = load_initial_model(tmp_path / "x", config, OURS, {"hash": "a"})
    assert loaded.dtype == "float32"
    assert loaded.tensors["embedding"].shape == (8448, 16)
    for change, message in (
        ({"mlp_size": 32}, "config.model.mlp_size=32, checkpoint: 24"),
        ({"num_kv_heads": 1}, "config.model.kv_heads=1, checkpoint: 2"),
        ({"tie_embeddings": True}, "config.model.tie_embeddings=True, checkpoint: False"),
    ):
        with pytest.raises(UserError, match=f"config.init_from=.*{message}"):
            load_initial_model(tmp_path / "x", dataclasses.replace(config, **change), OURS, {"hash": "a"})
    with pytest.raises(UserError, match="512 codes, checkpoint: 8192"):
        load_initial_model(tmp_path / "x", config, Vocabulary.for_codes(512), {"hash": "a"})
    recorded = dataclasses.replace(small_model(OURS), record={**small_model(OURS).record, "tokenizer": {"hash": "b"}})
    models.write(tmp_path / "recorded", recorded, "easylm")
    with pytest.raises(UserError, match=r"config\.init_from=.*another tokenizer"):
        load_initial_model(tmp_path / "recorded", config, OURS, {"hash": "a"})
    tuned = dataclasses.replace(recorded, record=recorded.record | {"tokenizer": {"hash": "b", "codes": "c"}})
    models.write(tmp_path / "tuned", tuned, "easylm")
    load_initial_model(tmp_path / "tuned", config, OURS, {"hash": "a", "codes": "c"})


@pytest.mark.slow
def test_train_init_from_every_format(demo, tmp_path, caplog):
    """With a zero learning rate the initial weights come out: sharded, from a smaller vocabulary."""
    tiny = tiny_lvm.get_config()
    tiny.data.store = (str(demo / "store"),)
    tiny.optimizer.update({"learning_rate": 1e-30, "end_learning_rate": 1e-30, "warmup_steps": 1})
    tiny.loop.total_steps = 2
    tiny.update({"batch_size": 8, "tokenizer": ""})
    tiny.mesh.update({"fsdp": 4, "data": 2})
    trained = models.read(demo / "lvm")
    small_vocabulary = trained.vocabulary.num_codes + 100
    for format in models.FORMATS:
        convert.convert(str(demo / "lvm"), str(tmp_path / format), format, vocabulary_size=small_vocabulary)
        tiny.init_from = str(tmp_path / format)
        train(from_config_dict(TrainConfig, tiny), str(tmp_path / f"from {format}"))
        loaded = models.read(tmp_path / f"from {format}")
        assert loaded.step == 2
        for name, tensor in trained.tensors.items():
            rows, expected = loaded.tensors[name].read(), tensor.read()
            if name == "head":
                rows, expected = rows.T, expected.T
            kept = small_vocabulary if name in ("embedding", "head") else len(expected)
            np.testing.assert_array_equal(rows[:kept], expected[:kept])
    arrays = open_params(tmp_path / "from hf", 2, stacked_shapes(trained.config))
    assert arrays["layers.mlp.up"].chunk_layout.read_chunk.shape[0] == 1  # so that a layer is read by itself
    assert "vocabulary changes from" in caplog.text
    with pytest.raises(UserError, match=r"converted weights and no training; start one .*--config\.init_from"):
        train(from_config_dict(TrainConfig, tiny), str(tmp_path / "orbax"))


@pytest.mark.slow
def test_export_prompts_and_evaluates_like_its_run(demo, tmp_path):
    """Resized; and without its run record, where evaluation needs `config.data.components`."""
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
    run("lvm.evaluate", *common, f"--model={tmp_path / 'hf'}", f"--out={tmp_path / 'recorded'}")
    (tmp_path / "hf" / "lvm.json").unlink()
    unrecorded = [
        *common,
        f"--model={tmp_path / 'hf'}",
        f"--out={tmp_path / 'unrecorded'}",
        "--config.unseen=true",
    ]
    assert "config.data.components is empty" in run("lvm.evaluate", *unrecorded, code=2)
    assert "can't be verified" in run("lvm.prompt", *shared, "--sequence", image, image)


# --- Memory -----------------------------------------------------------------------------------------------------


MEASURE = """
import sys
import lvm
from lvm import convert
from scripts.peak_memory import peak_mib
before = peak_mib()
convert.convert(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_bytes=10**8)
print((peak_mib() - before) * 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["hf orbax", "orbax hf", "orbax easylm", "easylm orbax"])
def test_convert_peak_memory(chain, tmp_path):
    """A model of 1.2 GB, whose largest stacked tensor is 0.3 GB and whose largest layer is 19 MB."""
    origin, format = chain.split()
    sizes = {"hidden_size": 1024, "mlp_size": 4608, "num_layers": 16, "num_heads": 8, "context": 64}
    models.write(tmp_path / "source", small_model(**sizes), origin)
    total = sum(tensor.nbytes for tensor in small_model(**sizes).tensors.values())
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "out", format],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    largest = 16 * 1024 * 4608 * 4 if format == "orbax" else 10**8
    used = float(process.stdout.splitlines()[-1])
    assert used < 5 * 10**8 + 2 * largest
    assert used < total
    assert_same_tensors(models.read(tmp_path / "out"), models.read(tmp_path / "source"))
