"""Every file of configs/ builds a valid configuration."""

import dataclasses
import runpy

import pytest

from lvm.common.config import from_config_dict
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.evaluation.config import EvalConfig
from lvm.hardware.accelerators import resolve
from lvm.model.nnx_utils import abstract_module, count_params
from lvm.model.transformer import SIZES, Transformer
from lvm.planning.estimate import MemoryModel, count_parameters
from lvm.planning.plan import Target, estimate_plan, resolve_config
from lvm.scaling.config import SweepConfig
from lvm.scaling.plan import plan_sweep
from lvm.training.config import TrainConfig
from tests.commands import ROOT
from tokenizer.config import TokenizerConfig
from tokenizer.network import VQGAN
from tokenizer.planning import plan_tokenizer

PARAMETERS = {
    "100m": 116_974_720, "300m": 290_968_576, "600m": 648_396_288, "1b": 1_147_119_616, "3b": 3_274_742_400,
    "3b_tpu": 3_240_877_056, "7b": 6_544_199_680,
}  # fmt: skip


def load_config(path):
    return runpy.run_path(str(path))["get_config"]()


def target(name, slices=1):
    described = resolve(name)
    return Target(described, slices, (), described.accelerator.hbm_bytes)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_config_builds_with_shapes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = load_config(path)
    if "objective" in values:
        config = from_config_dict(TrainConfig, values)
        model = dataclasses.replace(config.model, vocabulary_size=config.model.vocabulary_size or 8448)
        shapes = abstract_module(lambda rngs: Transformer(model, rngs))[1]
        assert count_params(shapes) == count_parameters(model)
    elif "loss" in values:
        config = from_config_dict(TokenizerConfig, values)
        assert count_params(abstract_module(lambda rngs: VQGAN(config.model, rngs))[1]) > 0
    elif "points" in values:
        sweep = plan_sweep(from_config_dict(SweepConfig, values))
        assert not sweep.warnings
        assert sum(run.device_hours for run in sweep.runs) > 0
    elif "evaluations" in values:
        assert from_config_dict(EvalConfig, values).evaluations
    else:
        source = open_source(str(path), Preprocess(64))
        assert source.load(0).images.dtype == "uint8"


@pytest.mark.parametrize("size", PARAMETERS)
def test_paper_config_has_papers_size_and_fits(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"lvm_{size}.py"
    config = from_config_dict(TrainConfig, load_config(path))
    model = dataclasses.replace(config.model, vocabulary_size=8448)
    # Published with 8292 ids; embedding and head have a row more for each that we add.
    parameters = PARAMETERS[size] + 2 * (8448 - 8292) * model.hidden_size
    assert count_parameters(model) == parameters
    assert f"{parameters:,} parameters" in path.read_text()
    assert dataclasses.replace(config.model, remat="none") == SIZES[size]
    assert config.loop.with_total_steps(config.batch_size * model.context).total_steps == 200_272
    for described in (target("v5e:16x16"), target("v4:4x4x8"), target("v5p:4x4x8"), target("v6e:16x16")):
        assert estimate_plan(resolve_config(config, described, 8192), described, MemoryModel()).fits
    two = target("v5e:16x16", 2)
    assert resolve_config(config, two, 8192).mesh.data % 2 == 0


TOKENIZERS = ("f16_8192", "vqgan_plus", "ibq", "maskgit", "lvm")


def load_tokenizer(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"tokenizer_{name}.py"
    return from_config_dict(TokenizerConfig, load_config(path)), path.read_text().split('"""')[1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_config_header_is_true(name, monkeypatch):
    config, header = load_tokenizer(name, monkeypatch)
    parameters = count_params(abstract_module(lambda rngs: VQGAN(config.model, rngs))[1])
    assert f"{parameters:,} parameters, {config.batch_size * config.loop.total_steps:,} images." in header
    assert "Hardware: " in header
    assert "Measured step time, MFU and rFID: not measured." in header
    config.adversarial.check(config.batch_size, config.model.resolution, config.loop.total_steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_config_header_has_flops(name, monkeypatch):
    """The whole step is traced at full size."""
    config, header = load_tokenizer(name, monkeypatch)
    result, error = plan_tokenizer(config, target("h100-8"))
    assert error is None
    days = config.loop.total_steps * result.roofline_seconds["flops"] / 0.35 / 86400
    assert f"{result.flops_per_step / 1e12:.1f} TFLOP a step; {days:.1f} days on 8 H100 at 35 %" in header


def test_config_headers_name_unmeasured_figures():
    for path in (ROOT / "configs").glob("lvm_*.py"):
        header = path.read_text().split('"""')[1]
        for word in (
            "parameters",
            "420B tokens",
            "Hardware:",
            "Plan",
            "Measured step time and MFU: not measured",
        ):
            assert word in header, (path.name, word)
