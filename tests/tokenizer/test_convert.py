"""tokenizer.convert, and training from converted weights."""

import dataclasses
import itertools
import pathlib
import shutil

import numpy as np
import pytest

from lvm.common import files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from tests.commands import run
from tests.configs import tiny_tokenizer
from tests.tokenizer.networks import check_same, random_weights, same_bits, small
from tokenizer import train as training
from tokenizer import weights
from tokenizer.config import TokenizerConfig
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig

pytest.importorskip("safetensors")
TINY = {"resolution": 16, "channel_multipliers": (1, 2), "codebook_size": 16, "codebook_dim": 4}


def test_convert_command(tmp_path):
    published = random_weights(small("maskgit", **TINY))
    weights.write(tmp_path / "maskgit", published, "maskgit")
    output = run("tokenizer.convert", tmp_path / "maskgit", tmp_path / "out", "--to=orbax")
    assert "16 codes of 4, 64 per image of 16×16" in output
    check_same(weights.read(tmp_path / "out"), published)
    assert "out: exists " in run("tokenizer.convert", tmp_path / "maskgit", tmp_path / "out", "--to=torch", code=2)
    assert "nowhere: doesn't exist; expected a workdir of tokenizer" in run(
        "tokenizer.convert", tmp_path / "nowhere", tmp_path / "x", "--to=torch", code=2
    )


@pytest.mark.slow
def test_training_starts_from_converted_weights(tmp_path):
    config = VQGANConfig(
        resolution=32, patch_size=8, channels=16, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
        middle_blocks=0, codebook_size=64, codebook_dim=4, norm_groups=4, block_bias=False, latent_kernel=1,
        quant_convs=False,
    )  # fmt: skip  # as in tests/configs/tiny_tokenizer.py
    initial = random_weights(config)
    weights.write(tmp_path / "converted", initial, "orbax")

    tiny = tiny_tokenizer.get_config()
    tiny.loss.autoencoder_steps = 0
    # With no learning rate and frozen averages, training returns its initial weights.
    tiny.optimizer.update({"learning_rate": 1e-30, "end_learning_rate": 1e-30, "warmup_steps": 1})
    tiny.model.quantizer.update({"dead_below": 0.0, "ema_decay": 0.9999999})
    tiny.loop.total_steps = 2

    def start(workdir, **changes):
        tiny_config = dataclasses.replace(from_config_dict(TokenizerConfig, tiny), **changes)
        training.train(tiny_config, tmp_path / workdir)

    with pytest.raises(UserError, match=r"converted weights and no training; start one .* new --workdir"):
        start("converted")
    init = {"init_from": str(tmp_path / "converted")}
    with pytest.raises(UserError, match="autoencoder_steps=8"):
        start("run", **init, loss=LossConfig(autoencoder_steps=8))
    with pytest.raises(UserError, match="codebook_size=32, there 64"):
        start("other", **init, model=dataclasses.replace(config, codebook_size=32))
    with pytest.raises(UserError, match="resizer='swscale', there 'pillow'"):
        start("other", **init, preprocess=Preprocess(32, resizer="swscale"))
    start("run", **init)
    stored = weights.read(tmp_path / "run")
    assert stored.step == 2
    codebook, initial_codebook = stored.params.pop("codebook"), initial.params.pop("codebook")
    same_bits(stored.params, initial.params)
    np.testing.assert_allclose(codebook, initial_codebook, atol=1e-3)  # it is not seeded anew
    shutil.rmtree(tmp_path / "converted")  # only a fresh start reads it
    tiny.loop.total_steps = 3
    start("run", **init)
    assert weights.read(tmp_path / "run").step == 3


def test_no_module_imports_torch_or_pickle():
    folders = [pathlib.Path(weights.__file__).parent, pathlib.Path(files.__file__).parent]
    for file in itertools.chain(*(folder.rglob("*.py") for folder in folders)):
        lines = [line.strip() for line in file.read_text().splitlines()]
        imports = [line for line in lines if line.startswith(("import torch", "from torch", "import pickle\n"))]
        assert not imports, f"{file}: {imports}"
