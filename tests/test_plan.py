"""The `plan` command and the planning library: estimates, errors, and one small compiled plan."""

import dataclasses
import json
import math
import re

import pytest

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import MixtureConfig
from lvm.hardware.accelerators import GIB, resolve
from lvm.hardware.sharding import MeshConfig
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import ModelConfig
from lvm.plan import main as plan_command
from lvm.plan import make_target, plan, search_plan
from lvm.planning import plan as plan_module
from lvm.planning import search, topology
from lvm.planning.collectives import BETWEEN_SLICES, PADDING, ideal_collective_bytes
from lvm.planning.estimate import MemoryModel, count_parameters, temp_bytes
from lvm.planning.meshes import validate_mesh
from lvm.planning.plan import Target, estimate_plan, make_plan, resolve_config
from lvm.planning.report import format_plan
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.next_token import ObjectiveConfig
from tests.commands import ROOT, run
from tests.configs import tiny_tokenizer
from tokenizer import planning
from tokenizer.config import TokenizerConfig
from tokenizer.planning import plan_tokenizer

KEYS = {
    "topology", "chips", "config", "per_chip", "fits", "flops_per_step", "collectives", "roofline_seconds",
    "compile_seconds",
}  # fmt: skip
MEMORY = {"params_bytes", "optimizer_bytes", "temp_bytes", "total_bytes", "hbm_bytes"}
SMALL = ModelConfig(
    hidden_size=256, mlp_size=512, num_layers=3, num_heads=2, vocabulary_size=512, context=256, remat="full"
)  # fmt: skip
CONFIG = TrainConfig(
    batch_size=4,
    model=SMALL,
    data=MixtureConfig(heldout_fraction=0.0),
    mesh=MeshConfig(data=1, fsdp=4),
    objective=ObjectiveConfig(logits_chunk=128),
    loop=LoopConfig(total_steps=10_000),
)


def absent(name, slices=1):
    """A target for which nothing is compiled."""
    slice_ = resolve(name)
    return Target(slice_, slices, (), slice_.accelerator.hbm_bytes)


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def test_plan_gpu_json():
    output = run("lvm.plan", "--config=configs/lvm_300m.py", "--topology=h100-64", "--json")
    result = json.loads(output)
    assert set(result) == KEYS
    assert set(result["per_chip"]) == MEMORY
    assert (result["topology"], result["chips"], result["fits"]) == ("h100-64", 64, True)
    assert set(result["roofline_seconds"]) == {"flops", "hbm", "ici"}
    assert all(set(collective) == {"kind", "bytes", "count"} for collective in result["collectives"])
    assert result["compile_seconds"] is None
    assert result["per_chip"]["hbm_bytes"] == 80 * GIB
    model = ModelConfig(hidden_size=1024, mlp_size=2688, num_layers=22, num_heads=8, vocabulary_size=8448, context=4096)
    assert result["flops_per_step"] == 512 * 4096 * train_flops_per_token(model, 4096, "causal")


def test_plan_gpu_report_is_marked_as_estimate():
    options = ["--topology=h200-8", "--hbm_gib=60.5", "--config.batch_size=64"]
    output = run("lvm.plan", "--config=configs/lvm_300m.py", *options)
    assert "an estimate: no program was compiled" in output
    assert "of 60.50 GiB usable" in output
    assert "291,288,064 parameters" in output


def test_plan_tokenizer_json_and_flags(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["--config=tests/configs/tiny_tokenizer.py", "--topology=h100-8"]
    assert plan_command([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["chips"], result["fits"]) == (8, None)
    assert result["flops_per_step"] > 0
    assert result["per_chip"]["state_bytes"] >= 3 * 4 * result["parameters"]  # weights and Adam's moments
    assert plan_command([*arguments, "--config.batch_size=12"]) == 2
    assert "config.batch_size=12 be a multiple" in capsys.readouterr().err
    assert plan_command([*arguments, "--search"]) == 2
    assert capsys.readouterr().err.startswith("error: --search")


@pytest.mark.parametrize(("images", "advice"), [(3, "try config.batch_size=8, or"), (1, "one image per chip needs")])
def test_plan_tokenizer_advises_what_may_fit(monkeypatch, images, advice):
    monkeypatch.setattr(planning, "count_flops", lambda *_: 1)
    monkeypatch.setattr(planning.TokenizerPlan, "fits", False)
    config = from_config_dict(TokenizerConfig, tiny_tokenizer.get_config())
    _, error = plan_tokenizer(dataclasses.replace(config, batch_size=8 * images), make_target("h100-8"))
    assert error.endswith(f"the step doesn't fit; {advice} more chips")


@pytest.mark.slow
def test_plan_tokenizer_compiles_for_tpus():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    config = from_config_dict(TokenizerConfig, tiny_tokenizer.get_config())
    result, error = plan_tokenizer(config, make_target("v5e-4"))
    assert error is None
    assert result.fits
    assert result.total_bytes > result.state_bytes > 0
    assert result.roofline_seconds["hbm"] > 0


def test_plan_unknown_slice_names_nearest():
    output = run("lvm.plan", "--config=configs/lvm_300m.py", "--topology=v5e:10x10", code=2)
    assert output.startswith("error: v5e:10x10")
    assert "v5e-128 = v5e:8x16, 128 chips" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (("h100-8", 2), r"^--slices=2 .*h100-64"),
        (("v5e-8", 1, 5.0), r"^--hbm_gib=5\.0 .*v5e"),
        (("v3-8",), r"^v3-8: .*v4, v5e, v5p, v6e"),
    ],
)
def test_make_target_rejects_unsupported(target, match):
    with pytest.raises(UserError, match=match):
        make_target(*target)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mesh": MeshConfig(data=-1, fsdp=48)}, r"config\.mesh\.data=1 config\.mesh\.fsdp=64 "),
        ({"batch_size": 40}, r" config\.batch_size=64 config\.objective\.accumulate_steps=1$"),
    ],
)
def test_plan_invalid_mesh_names_nearest(changes, match):
    config = dataclasses.replace(CONFIG, **({"batch_size": 64, "mesh": MeshConfig()} | changes))
    with pytest.raises(UserError, match=match):
        plan(config, absent("h100-64"))


def test_plan_too_large_prints_plan_and_nearest_fit():
    arguments = ["--config=configs/lvm_7b.py", "--topology=h100-64", "--config.model.remat=none"]
    output = run("lvm.plan", *arguments, code=2)
    assert "DOES NOT FIT" in output
    error = output.strip().splitlines()[-1]
    assert error.startswith("error: h100-64: ")
    assert error.endswith(": config.model.remat=attention")


def test_make_target_without_libtpu_names_requirements(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*: pip install '\.\[plan\]'$"):
        make_target("v5e-8")


def test_plan_too_large_names_larger_slice():
    config = with_model(CONFIG, hidden_size=4096, mlp_size=11008, num_layers=32, num_heads=32)
    result, error = plan(config, absent("v5e:2x2"))
    assert not result.fits
    # 7B needs 12 bytes per parameter for its state and 10 for temporaries: at 15.2 GiB per chip, at least 16 chips.
    assert "v5e:4x4 with config.mesh.fsdp=16" in error
    assert "(by estimate)" in error


MODEL_3B = ModelConfig(hidden_size=3200, mlp_size=8640, num_layers=26, num_heads=32, vocabulary_size=8448)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(data=-1, fsdp=64), MeshConfig(data=4, fsdp=64)),
        (MeshConfig(data=256, fsdp=-1), MeshConfig(data=256, fsdp=1)),
        (MeshConfig(data=4, fsdp=32, tensor=2), MeshConfig(data=4, fsdp=32, tensor=2)),
    ],
)
def test_validate_mesh_resolves(mesh, expected):
    assert validate_mesh(TrainConfig(model=MODEL_3B, mesh=mesh, batch_size=256), 256, 1) == expected


@pytest.mark.parametrize(
    ("model", "mesh", "chips", "slices", "match"),
    [
        # 3200 = 2⁷ · 25
        (MODEL_3B, MeshConfig(data=1, fsdp=256), 256, 1, r"3200.*config\.mesh\.data=2 config\.mesh\.fsdp=128 "),
        (MODEL_3B, MeshConfig(data=1, fsdp=512), 512, 2, r"2 slices.*config\.mesh\.data=4 config\.mesh\.fsdp=128 "),
        (dataclasses.replace(MODEL_3B, context=4095), MeshConfig(), 9, 2, "no mesh of 9 chips"),
    ],
)  # fmt: skip
def test_validate_mesh_names_nearest(model, mesh, chips, slices, match):
    with pytest.raises(UserError, match=match):
        validate_mesh(TrainConfig(model=model, mesh=mesh, batch_size=chips), chips, slices)


def test_ideal_collective_bytes_by_hand():
    D, F, L, V = 256, 512, 3, 512
    layer, embeddings = 4 * D * D + 3 * D * F, 2 * V * D
    config = dataclasses.replace(CONFIG, batch_size=8, mesh=MeshConfig(data=2, fsdp=4))
    ideal = ideal_collective_bytes(config)
    assert ideal == {
        "all-gather": 2 * (2 * L * layer + embeddings) * 3 / 4,
        "reduce-scatter": 2 * (L * layer + embeddings) * 3 / 4,
        "all-reduce": 2 * 2 * (L * layer + embeddings) / 4 * 1 / 2,
    }
    # Over two slices, `data` spans them.
    between = ideal_collective_bytes(config, slices=2)
    assert between[BETWEEN_SLICES] == ideal["all-reduce"]
    assert "all-reduce" not in between
    # Activations of 512 tokens: queries, keys, values and outputs are exchanged; 2 reductions in each direction.
    mesh = MeshConfig(data=2, fsdp=1, sequence=2, tensor=2)
    split = ideal_collective_bytes(dataclasses.replace(config, mesh=mesh))
    tokens = 8 * 256 / 4
    assert split["all-to-all"] == L * 2 * (4 * 2 * tokens * D / 2) / 2
    gradients = 2 * 2 * (L * layer + embeddings) / 2 * (1 / 2 + 1 / 2)
    assert split["all-reduce"] == gradients + L * 4 * 2 * 2 * tokens * D / 2


def test_memory_model_is_calibrated_by_compiled_programs():
    memory = MemoryModel()
    uncalibrated = memory.temp_bytes(CONFIG)
    assert uncalibrated == pytest.approx(temp_bytes(CONFIG).sum())
    memory.observe(CONFIG, 2 * uncalibrated)
    assert memory.temp_bytes(CONFIG) == pytest.approx(2 * uncalibrated)
    # Two batch sizes determine the scale of the activations.
    memory = MemoryModel()
    for batch_size in (4, 64):
        config = dataclasses.replace(CONFIG, batch_size=batch_size)
        weights, activations = temp_bytes(config)
        memory.observe(config, 3 * activations + weights)
    assert memory.temp_bytes(config) == pytest.approx(3 * activations + weights, rel=0.02)


def test_search_plan_gpu_takes_largest_batch_that_fits():
    (best,) = search_plan(with_model(CONFIG, num_layers=22, hidden_size=1024, context=4096), absent("h100-8"))
    assert best.fits
    batch_size = best.config.batch_size
    assert batch_size >= 8
    doubled = estimate_plan(dataclasses.replace(best.config, batch_size=2 * batch_size), best.target, MemoryModel())
    is_slower = doubled.min_step_seconds >= 2 * best.min_step_seconds * 0.99
    assert batch_size == 16 * 8 or not doubled.fits or is_slower


@pytest.mark.slow
def test_search_limits_compiles_and_keeps_what_fits(monkeypatch):
    target = dataclasses.replace(absent("v5e:2x2"), devices=("a chip",) * 4)
    compiled = []

    def thrice_the_estimate(config, target, memory):
        estimate = estimate_plan(config, dataclasses.replace(target, devices=()), MemoryModel())
        memory.observe(config, 3 * estimate.temp_bytes)
        compiled.append(config)
        total = estimate.total_bytes + 2 * estimate.temp_bytes
        return dataclasses.replace(estimate, target=target, total_bytes=total, temp_bytes=3 * estimate.temp_bytes)

    monkeypatch.setattr(search, "make_plan", thrice_the_estimate)
    config = with_model(CONFIG, num_layers=22, hidden_size=1536, mlp_size=4096, num_heads=16, context=4096)
    plans = search.search(config, target, MemoryModel())
    assert len(plans) == len(compiled) <= 5
    assert plans[-1].fits
    assert len({str(plan.config) for plan in plans}) == len(plans)


@pytest.fixture(scope="module")
def small_plan():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    target = make_target("v5e-4")
    return make_plan(resolve_config(CONFIG, target, 0), target, MemoryModel())


def test_compiling_is_announced(monkeypatch, caplog):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    monkeypatch.setattr(plan_module, "required_bytes", lambda step: None)  # as if the compiler refused it
    target = make_target("v5e-4")
    make_plan(resolve_config(CONFIG, target, 0), target, MemoryModel())
    assert re.search(r"compiling for v5e-4, fsdp 4, remat \w+: minutes", caplog.text)


def test_compiled_plan_memory_by_hand(small_plan):
    D, F, L, V = 256, 512, 3, 512
    layer, vectors = 4 * D * D + 3 * D * F, 2 * L * D + D
    matrices = L * layer + 2 * V * D
    assert count_parameters(SMALL) == matrices + vectors
    # float32; a quarter of the matrices and all norms per chip. Adam has two moments and a few counts.
    held = 4 * (matrices // 4 + vectors)
    assert small_plan.params_bytes == held
    assert held * 2 <= small_plan.optimizer_bytes <= held * 2 + 64
    tokens = 4 * (257 + 256) + 256 + 2 * 256  # one row: int32 tokens and positions, mask, component ids
    assert small_plan.total_bytes >= small_plan.temp_bytes + 3 * held + tokens
    assert small_plan.total_bytes <= small_plan.temp_bytes + 3 * held + 64 * 1024
    assert small_plan.fits
    assert small_plan.compile_seconds > 0


def test_compiled_plan_collectives_by_hand(small_plan):
    D, F, L, V = 256, 512, 3, 512
    layer, embeddings = 4 * D * D + 3 * D * F, 2 * V * D
    received = {collective.kind: collective for collective in small_plan.collectives}
    # Seven weights per layer, twice; embedding and output projection once. A chip receives three quarters of each.
    assert received["all-gather"].count == 2 * 7 * L + 2
    assert received["all-gather"].bytes == 2 * (2 * L * layer + embeddings) * 3 / 4
    # The embedding's gradient is reduced or scattered in float32, everything else is scattered in bfloat16.
    scattered = 2 * (L * layer + V * D) * 3 / 4
    embedding = {2 * V * D * 3 / 4, 4 * V * D * 3 / 4, 0}
    assert received["reduce-scatter"].bytes - scattered in embedding
    vectors = 2 * 4 * (2 * L * D + D) * 3 / 4
    expected = vectors + (0 if received["reduce-scatter"].bytes > scattered else 2 * 2 * V * D * 3 / 4)
    assert -1 < received["all-reduce"].bytes - expected < 1024
    assert PADDING not in received  # shards of 64 rows are whole tiles
    assert small_plan.ideal_ratio == pytest.approx(1.0, abs=0.1)
    assert small_plan.roofline_seconds["ici"] == pytest.approx(sum(c.bytes for c in small_plan.collectives) / 200e9)


def test_compiled_plan_report_and_json(small_plan):
    text = "\n".join(format_plan(small_plan))
    assert "v5e:2x2: 4 chips, mesh fsdp 4" in text
    assert "times ideal fully sharded training" in text
    assert "compiled in" in text
    result = small_plan.to_json()
    assert set(result) == KEYS
    assert set(result["per_chip"]) == MEMORY
    assert json.loads(json.dumps(result))["per_chip"] == result["per_chip"]
    assert result["topology"] == "v5e:2x2"
    traffic = small_plan.roofline_seconds["hbm"] * 819e9
    # Everything is read and written at least once, and at most twenty times.
    assert small_plan.total_bytes < traffic < 20 * small_plan.total_bytes
    assert math.isclose(result["flops_per_step"], 4 * 256 * train_flops_per_token(SMALL, 256, "causal"))


@pytest.mark.slow
def test_search_plan_tpu_limits_compiles():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    plans = search_plan(CONFIG, make_target("v5e-4"))
    assert len(plans) <= search.MAX_COMPILES + 1
    assert plans[-1].fits
    assert plans[-1].compile_seconds is not None
