"""The benchmark of quantizers: one network for each, its table, and the whole command at a tiny size."""

import dataclasses
import json

import pytest

from lvm.common.errors import UserError
from scripts import benchmark_quantizers
from scripts.benchmark_quantizers import KINDS, table, with_quantizer
from tests.commands import ROOT, run
from tokenizer.network import VQGANConfig

SMALL = VQGANConfig(resolution=32, codebook_size=64, codebook_dim=16)


def test_quantizers_have_equal_numbers_of_codes():
    networks = {kind: with_quantizer(SMALL, kind) for kind in KINDS}
    assert [network.quantizer.kind for network in networks.values()] == list(KINDS)
    assert {network.codebook_size for network in networks.values()} == {64}
    assert {kind: network.codebook_dim for kind, network in networks.items()} == {
        "vq": 16, "l2_vq": 8, "simvq": 16, "ibq": 16, "fsq": 3
    }  # fmt: skip
    assert {network.channels for network in networks.values()} == {SMALL.channels}


def test_fsq_needs_a_power_of_four():
    with pytest.raises(UserError, match="codebook_size=32 must be a power of 4"):
        with_quantizer(dataclasses.replace(SMALL, codebook_size=32), "fsq")


def test_table_has_report_and_median_step(tmp_path):
    (tmp_path / "vq").mkdir()
    steps = [{"step": 1, "step_seconds": 9.0}, {"step": 2, "step_seconds": 0.2}, {"step": 3, "step_seconds": 0.3}]
    (tmp_path / "vq" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    values = {"psnr/rgb": 21.234, "ssim/rgb": 0.5678, "codebook_usage": 0.9, "codebook_perplexity": 40.4}
    figures = {name: {"vq": {"value": value}} for name, value in values.items()}
    lines = table({"figures": figures}, {"vq": tmp_path / "vq"}, 1).splitlines()
    assert lines[0] == "| quantizer | PSNR, dB | SSIM | usage | perplexity | step, ms |"
    assert lines[2:] == ["| `vq` | 21.23 | 0.568 | 0.900 | 40 | 250 |"]


@pytest.mark.slow
def test_command_trains_and_measures_all(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "JAX_DISABLE_MOST_OPTIMIZATIONS", "True"
    )  # unlike other slow tests, it compiles most of its time
    options = ["--config.loop.total_steps=20", "--config.loop.log_every=5", "--config.loop.picture_every=0"]
    heldout = tmp_path / "heldout.py"
    heldout.write_text((ROOT / "tests/configs/tiny_scenes.py").read_text().replace('"seed": 1', '"seed": 2'))
    arguments = [*options, f"--heldout={heldout}", f"--out={tmp_path}"]
    output = run("scripts.benchmark_quantizers", "--config=tests/configs/tiny_tokenizer.py", *arguments)
    assert [line.split("`")[1] for line in output.splitlines() if line.startswith("| `")] == list(KINDS)
    assert (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heldout=tests/configs/tiny_scenes.py"], "--heldout=tests/configs/tiny_scenes.py is config.data.source"),
        (["--heldout=absent"], "absent"),
        (["--heldout=configs/demo_scenes.py", "--config.model.codebook_size=32"], "codebook_size=32 must be a power"),
        (
            ["--heldout=configs/demo_scenes.py", "--config.loss.autoencoder_steps=60"],
            "config.loop.total_steps=60 must be above config.loss.autoencoder_steps=60",
        ),
    ],
)
def test_what_cannot_work_is_named_before_training(tmp_path, capsys, arguments, message):
    arguments = ["--config=tests/configs/tiny_tokenizer.py", *arguments, f"--out={tmp_path / 'out'}"]
    assert benchmark_quantizers.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
