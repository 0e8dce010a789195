"""The command, for what needs no libtpu: estimates and refusals; and one small plan that is compiled."""

import dataclasses
import json
import math

import pytest

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import MixtureConfig
from lvm.hardware.accelerators import GIB, resolve
from lvm.hardware.sharding import MeshConfig
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import ModelConfig
from lvm.plan import plan, search_plan, target_of
from lvm.planning import collectives, meshes, search, topology
from lvm.planning.collectives import PADDING
from lvm.planning.estimate import Memory, Shape, count_parameters, temporaries
from lvm.planning.plan import Target, estimated, make_plan, resolve_config, shape_of
from lvm.planning.report import lines, of_theory
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.next_token import ObjectiveConfig
from tests.commands import run

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
    """A target of which no program is compiled."""
    described = resolve(name)
    return Target(described, slices, (), described.accelerator.hbm_bytes)


def test_a_gpu_plan_is_one_json_object_and_nothing_else():
    said = run("lvm.plan", "--config=configs/lvm_300m.py", "--topology=h100-64", "--json")
    found = json.loads(said)
    assert set(found) == KEYS
    assert set(found["per_chip"]) == MEMORY
    assert (found["topology"], found["chips"], found["fits"]) == ("h100-64", 64, True)
    assert set(found["roofline_seconds"]) == {"flops", "hbm", "ici"}
    assert all(set(collective) == {"kind", "bytes", "count"} for collective in found["collectives"])
    assert found["compile_seconds"] is None
    assert found["per_chip"]["hbm_bytes"] == 80 * GIB
    model = dataclasses.replace(
        SMALL, hidden_size=1024, mlp_size=2688, num_layers=22, num_heads=8, vocabulary_size=8448
    )
    wanted = 512 * 4096 * train_flops_per_token(dataclasses.replace(model, context=4096), 4096, "causal")
    assert found["flops_per_step"] == wanted


def test_an_estimate_says_that_it_is_one():
    said = run(
        "lvm.plan",
        "--config=configs/lvm_300m.py",
        "--topology=h200-8",
        "--hbm_gib=60.5",
        "--config.batch_size=64",
    )
    assert "an estimate: no program was compiled" in said
    assert "of 60.50 GiB may be used" in said
    assert "291,288,064 parameters" in said


def test_a_slice_that_does_not_exist_is_one_line_with_the_nearest():
    said = run("lvm.plan", "--config=configs/lvm_300m.py", "--topology=v5e:10x10", code=2)
    assert said == "error: v5e:10x10: no such slice; the nearest is v5e-128 = v5e:8x16, 128 chips\n"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("h100-8", 2), r"^--slices: 2; GPUs have none"),
        (("v5e-8", 1, 5.0), r"^--hbm_gib: 5\.0; the memory of v5e is known"),
        (("v3-8",), r"^v3-8: TPUs that are planned for are v4, v5e, v5p, v6e"),
    ],
)
def test_targets_that_cannot_be_planned_for_are_refused(target, message):
    with pytest.raises(UserError, match=message):
        target_of(*target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": MeshConfig(data=-1, fsdp=48)},
            r"; the nearest that does: config\.mesh\.data=1 config\.mesh\.fsdp=64 ",
        ),
        ({"batch_size": 40}, r" with config\.batch_size=64 config\.objective\.accumulate_steps=1$"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_nearest(changes, message):
    config = dataclasses.replace(CONFIG, **({"batch_size": 64, "mesh": MeshConfig()} | changes))
    with pytest.raises(UserError, match=message):
        plan(config, absent("h100-64"))


def test_a_plan_that_does_not_fit_is_printed_and_ends_with_what_would():
    arguments = ["--config=configs/lvm_7b.py", "--topology=h100-64", "--config.model.remat=none"]
    said = run("lvm.plan", *arguments, code=2)
    assert "DOES NOT FIT" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: h100-64: needs ")
    assert last.endswith("; the nearest that fits: config.model.remat=attention")


def test_without_libtpu_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, which isn't installed: pip install '\.\[plan\]'$"):
        target_of("v5e-8")


def test_a_model_too_large_for_a_slice_names_a_larger_one():
    config = resolve_config(dataclasses.replace(CONFIG, mesh=MeshConfig()), absent("v5e:2x2"), 0)
    huge = dataclasses.replace(SMALL, hidden_size=4096, mlp_size=11008, num_layers=32, num_heads=32)
    huge_config = dataclasses.replace(config, model=huge, mesh=MeshConfig(data=1, fsdp=4))
    found, complaint = plan(huge_config, absent("v5e:2x2"))
    assert not found.fits
    # 7B needs 12 bytes a parameter for its state and 10 for temporaries: of 15.2 GiB, 16 chips or more.
    assert "the nearest that fits: v5e:4x4 with config.mesh.fsdp=16" in complaint
    assert "(by estimate)" in complaint


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (MeshConfig(data=-1, fsdp=64), MeshConfig(data=4, fsdp=64)),
        (MeshConfig(data=256, fsdp=-1), MeshConfig(data=256, fsdp=1)),
        (MeshConfig(data=4, fsdp=32, tensor=2), MeshConfig(data=4, fsdp=32, tensor=2)),
    ],
)
def test_meshes_that_divide_are_taken_as_they_are(asked, found):
    model = ModelConfig(hidden_size=3200, mlp_size=8640, num_layers=26, num_heads=32, vocabulary_size=8448)
    assert meshes.checked(model, asked, 256, 1, 256, 1) == found


def test_the_nearest_mesh_divides_everything():
    model = ModelConfig(hidden_size=3200, mlp_size=8640, num_layers=26, num_heads=32, vocabulary_size=8448)
    with pytest.raises(UserError, match=r"3200.*config\.mesh\.data=2 config\.mesh\.fsdp=128 "):
        meshes.checked(model, MeshConfig(data=1, fsdp=256), 256, 1, 256, 1)  # 3200 = 2⁷ · 25
    with pytest.raises(UserError, match=r"in 2 slices.*config\.mesh\.data=4 config\.mesh\.fsdp=128 "):
        meshes.checked(model, MeshConfig(data=1, fsdp=512), 512, 2, 512, 1)
    with pytest.raises(UserError, match="no mesh of so many chips does"):
        meshes.checked(dataclasses.replace(model, context=4095), MeshConfig(), 9, 2, 9, 1)


def test_theory_of_fully_sharded_training_by_hand():
    D, F, L, V = 256, 512, 3, 512
    layer, ends = 4 * D * D + 3 * D * F, 2 * V * D
    mesh = {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    found = collectives.ideal_collective_bytes(SMALL, 8, mesh)
    assert found == {
        "all-gather": 2 * (2 * L * layer + ends) * 3 / 4,
        "reduce-scatter": 2 * (L * layer + ends) * 3 / 4,
        "all-reduce": 2 * 2 * (L * layer + ends) / 4 * 1 / 2,
    }
    # Over two slices `data` goes between them.
    between = collectives.ideal_collective_bytes(SMALL, 8, mesh, slices=2)
    assert between["between slices"] == found["all-reduce"]
    assert "all-reduce" not in between
    # Activations: queries, keys, values and results of 512 tokens are exchanged, 2 in each direction summed.
    split = collectives.ideal_collective_bytes(
        SMALL, 8, mesh | {"fsdp": 1, "sequence": 2, "tensor": 2, "data": 2}
    )
    tokens = 8 * 256 / 4
    assert split["all-to-all"] == L * 2 * (4 * 2 * tokens * D / 2) / 2
    assert (
        split["all-reduce"]
        == 2 * 2 * (L * layer + ends) / 2 * (1 / 2 + 1 / 2) + L * 4 * 2 * 2 * tokens * D / 2
    )


def test_the_formula_is_fitted_to_what_was_compiled():
    memory, shape = Memory(), Shape(SMALL, MeshConfig(data=1, fsdp=4), 4, 1, 128)
    plain = memory.temporaries(shape)
    assert plain == pytest.approx(sum(temporaries(shape).values()))
    memory.learn(shape, 2 * plain)
    assert memory.temporaries(shape) == pytest.approx(2 * plain)
    # More rows are more activations: two programs tell what scales with them.
    parts = temporaries(dataclasses.replace(shape, rows=64))
    memory = Memory()
    for rows in (4, 64):
        of = temporaries(dataclasses.replace(shape, rows=rows))
        memory.learn(dataclasses.replace(shape, rows=rows), 3 * of["activations"] + of["weights"])
    many = dataclasses.replace(shape, rows=64)
    assert memory.temporaries(many) == pytest.approx(3 * parts["activations"] + parts["weights"], rel=0.02)


def test_a_search_by_formula_takes_the_largest_batch_that_fits():
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(SMALL, num_layers=22, hidden_size=1024, context=4096)
    )
    (found,) = search_plan(config, absent("h100-8"))
    assert found.fits
    assert found.config.batch_size >= 8
    more = dataclasses.replace(found.config, batch_size=2 * found.config.batch_size)
    slower = estimated(more, found.target, Memory())
    assert (
        found.config.batch_size == 16 * 8
        or not slower.fits
        or slower.least_seconds >= 2 * found.least_seconds * 0.99
    )


@pytest.mark.slow
def test_a_search_stops_after_few_compiles_and_keeps_what_fits(monkeypatch):
    target = dataclasses.replace(absent("v5e:2x2"), devices=("a chip",) * 4)
    compiled = []

    def needs_three_times_the_formula(config, target, memory):
        guess = estimated(config, dataclasses.replace(target, devices=()), Memory())
        memory.learn(shape_of(config), 3 * guess.temp_bytes)
        compiled.append(config)
        total = guess.total_bytes + 2 * guess.temp_bytes
        return dataclasses.replace(guess, target=target, total_bytes=total, temp_bytes=3 * guess.temp_bytes)

    monkeypatch.setattr(search, "make_plan", needs_three_times_the_formula)
    large = dataclasses.replace(
        SMALL, num_layers=22, hidden_size=1536, mlp_size=4096, num_heads=16, context=4096
    )
    config = dataclasses.replace(CONFIG, model=large, mesh=MeshConfig(data=1, fsdp=4))
    found = search.best(config, target, Memory())
    assert len(found) == len(compiled) <= 5
    assert found[-1].fits
    assert len({str(plan.config) for plan in found}) == len(found)


@pytest.fixture(scope="module")
def small_plan():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    target = target_of("v5e-4")
    return make_plan(resolve_config(CONFIG, target, 0), target, Memory())


def test_a_compiled_plan_has_the_bytes_that_a_count_by_hand_has(small_plan):
    D, F, L, V = 256, 512, 3, 512
    layer, vectors = 4 * D * D + 3 * D * F, 2 * L * D + D
    matrices = L * layer + 2 * V * D
    assert small_plan.parameters == count_parameters(SMALL) == matrices + vectors
    # Float32; every chip has a quarter of the matrices, and the norms whole. Adam has two moments, and a few counts.
    held = 4 * (matrices // 4 + vectors)
    assert small_plan.params_bytes == held
    assert held * 2 <= small_plan.optimizer_bytes <= held * 2 + 64
    tokens = 4 * (257 + 256) + 256 + 2 * 256  # of one row: int32 tokens and positions, a mask, sources
    assert small_plan.total_bytes >= small_plan.temp_bytes + 3 * held + tokens
    assert small_plan.total_bytes <= small_plan.temp_bytes + 3 * held + 64 * 1024
    assert small_plan.fits
    assert small_plan.compile_seconds > 0


def test_a_compiled_plan_has_the_collectives_that_a_count_by_hand_has(small_plan):
    D, F, L, V = 256, 512, 3, 512
    layer, ends = 4 * D * D + 3 * D * F, 2 * V * D
    found = {collective.kind: collective for collective in small_plan.sent}
    # Seven matrices a layer, twice; embedding and head once. A chip receives three quarters of each.
    assert found["all-gather"].count == 2 * 7 * L + 2
    assert found["all-gather"].bytes == 2 * (2 * L * layer + ends) * 3 / 4
    # The embedding's gradient is summed in float32 as a whole or in parts, all else is scattered in bfloat16.
    scattered = 2 * (L * layer + V * D) * 3 / 4
    embedding = {2 * V * D * 3 / 4, 4 * V * D * 3 / 4, 0}
    assert found["reduce-scatter"].bytes - scattered in embedding
    vectors = 2 * 4 * (2 * L * D + D) * 3 / 4
    reduced = found["all-reduce"].bytes - vectors
    assert -1 < reduced - (0 if found["reduce-scatter"].bytes > scattered else 2 * 2 * V * D * 3 / 4) < 1024
    assert PADDING not in found  # 64 rows of a shard are whole tiles
    assert of_theory(small_plan) == pytest.approx(1.0, abs=0.1)
    assert small_plan.seconds["ici"] == pytest.approx(sum(c.bytes for c in small_plan.sent) / 200e9)


def test_a_compiled_plan_is_reported_in_full(small_plan):
    text = "\n".join(lines(small_plan))
    assert "v5e:2x2: 4 chips, mesh fsdp 4" in text
    assert "times what fully sharded training should send" in text
    assert "compiled in" in text
    found = small_plan.to_json()
    assert set(found) == KEYS
    assert set(found["per_chip"]) == MEMORY
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found))
    assert found["topology"] == "v5e:2x2"
    moved = small_plan.seconds["hbm"] * 819e9
    # At least: what it keeps is read and written once; at most, twenty times all that it has.
    assert small_plan.total_bytes < moved < 20 * small_plan.total_bytes
    assert math.isclose(found["flops_per_step"], 4 * 256 * train_flops_per_token(SMALL, 256, "causal"))


@pytest.mark.slow
def test_a_search_compiles_few_programs_and_proposes_one_that_fits():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    found = search_plan(CONFIG, target_of("v5e-4"))
    assert len(found) <= search.MOST_COMPILES + 1
    assert found[-1].fits
    assert found[-1].compile_seconds is not None
