"""Plans of sweeps: FLOPs, branches, meshes, and what is refused or warned of."""

import dataclasses
import math

import pytest

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.model.flops import train_flops_per_token
from lvm.planning.estimate import count_parameters
from lvm.scaling import space
from lvm.scaling.config import SweepConfig, make_points
from lvm.scaling.manifest import Run, Sweep, read_sweep
from lvm.scaling.plan import extend_sweep, plan_sweep
from lvm.scaling.rules import RuleConfig
from lvm.scaling.shapes import ShapeConfig
from lvm.scaling.table import plan_table
from lvm.training.config import TrainConfig

SHAPE = ShapeConfig(depth="aspect", aspect=32, head_dim=8, multiple=8)
WIDTHS = space.param("width", 16, 24, 32, 48, 64)
MUP = space.zip_spaces(
    space.param("model.parametrization.name", "mup"), space.param("model.parametrization.base_width", 32)
)


def make(points, **changes):
    defaults = {"train": "configs/demo_lvm.py", "shape": SHAPE, "num_codes": 512, "unique_tokens": 1e9}
    return plan_sweep(SweepConfig(points=make_points(points), **{**defaults, **changes}))


def config_of(run):
    return from_config_dict(TrainConfig, cli.read_config(run.arguments))


def test_plan_hits_budgets_with_attention_and_head():
    sweep = make(space.isoflop([5e11], WIDTHS))
    for run in sweep.runs:
        config = config_of(run)
        model = dataclasses.replace(config.model, vocabulary_size=768)
        per_token = train_flops_per_token(model, model.context, "causal")
        tokens = config.loop.total_steps * config.batch_size * model.context
        assert run.tokens == tokens
        assert run.flops == tokens * per_token
        assert math.isclose(run.flops, 5e11, rel_tol=0.01)
        assert run.params == count_parameters(model)
        assert run.params - run.params_without_embedding == 2 * 768 * model.hidden_size
        assert config.optimizer.warmup_steps == run.warmup_steps == round(0.1 * run.steps)
    assert not sweep.warnings
    assert [run.name for run in sweep.runs] == [f"c5e11-w{w}" for w in (16, 24, 32, 48, 64)]


def test_overrides_reach_training_config():
    points = space.product(space.param("tokens", 1e6), space.param("width", 32), space.param("optimizer.b2", 0.9, 0.99))
    runs = make(points).runs
    assert [config_of(run).optimizer.b2 for run in runs] == [0.9, 0.99]
    assert [run.name for run in runs] == ["d1e06-w32-b2=0.9", "d1e06-w32-b2=0.99"]


def test_points_value_replaces_the_rules_b2():
    points = space.product(
        space.param("tokens", 1e7), space.param("width", 128), space.param("optimizer.b2", 0.9, 0.99)
    )
    runs = make(points, rule=RuleConfig("square_root_batch")).runs
    assert [config_of(run).optimizer.b2 for run in runs] == [0.9, 0.99]


def test_branches_share_a_trunk_and_its_hyperparameters():
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 1}
    points = [{**wsd, **point} for point in space.decay_branches(space.param("width", 32), [1e6, 2e6, 8e6])]
    sweep = make(points, rule=RuleConfig("step_law"))
    small, middle, trunk = sweep.runs
    starts = [run.steps - round(0.2 * run.steps) for run in (small, middle)]
    assert [run.trunk for run in sweep.runs] == [trunk.name, trunk.name, ""]
    assert [small.trunk_step, middle.trunk_step] == starts
    configs = [config_of(run) for run in sweep.runs]
    assert configs[2].loop.keep_steps == tuple(starts)
    assert len({config.optimizer.learning_rate for config in configs}) == 1
    assert len({config.batch_size for config in configs}) == 1
    assert len({config.optimizer.warmup_steps for config in configs}) == 1
    assert configs[0].optimizer.warmup_steps < starts[0]
    assert [config.optimizer.decay_steps for config in configs] == [round(0.2 * run.steps) for run in sweep.runs]
    assert sweep.tasks() == [(trunk, small, middle)]


def test_branches_need_wsd():
    with pytest.raises(UserError, match=r"needs config.optimizer.schedule=wsd, not cosine"):
        make(space.decay_branches(space.param("width", 32), [1e6, 2e6]))


def test_mesh_and_micro_batches_fit_accelerator():
    points = space.isoflop([1e20], space.param("width", 1536, 4096))
    small, large = make(
        points, train="configs/lvm_300m.py", shape=ShapeConfig(), num_codes=8192, unique_tokens=1e13,
        accelerator="h100-8", tokens_per_param=10,
    ).runs  # fmt: skip
    assert small.mesh == "data 8"
    assert "fsdp" in large.mesh
    assert config_of(large).mesh.fsdp > 1
    assert large.micro_batches == config_of(large).objective.accumulate_steps
    hours = 1e20 / (0.4 * 989e12) / 3600
    assert math.isclose(small.device_hours, hours, rel_tol=0.01)
    assert f"{small.device_hours + large.device_hours:,.2f} device-hours" in plan_table(Sweep(1, (small, large)))[-1]


@pytest.mark.parametrize(
    ("points", "changes", "words"),
    [
        (space.isoflop([1e10], space.param("width", 128)), {}, "miss its .* tokens by"),
        (space.isoflop([5e11], space.param("width", 16, 24, 32)), {}, "0 above the expected minimum"),
        (space.isoflop([5e11], WIDTHS), {"unique_tokens": 1e5}, "epochs, more than max_epochs=4"),
        (space.isoflop([5e11], space.param("width", 32, 33)), {}, "are the same run"),
        (space.isoflop([5e11], space.param("width", 32, 32)), {}, "is there twice"),
        (space.isoflop([5e11], space.product(WIDTHS, space.param("sead", 1))), {}, "no such key: 'sead'"),
        (space.isoflop([5e11], WIDTHS), {"train": "configs/none.py"}, "configs/none.py: no such file"),
        (space.isoflop([5e11], WIDTHS), {"unique_tokens": 0.0}, "without the stores, set config.unique_tokens"),
        (
            space.isoflop([5e11], space.product(WIDTHS, space.param("heldout_batches", 0))),
            {},
            "config.heldout_batches=0; a sweep compares held-out losses",
        ),
        (
            space.isoflop([5e11], space.product(WIDTHS, space.param("optimizer.warmup_steps", 10))),
            {},
            "optimizer.warmup_steps is chosen by the sweep",
        ),
        (
            space.product(
                space.param("tokens", 2**20),
                space.param("width", 32),
                space.param("config.mesh.fsdp", 2),
                space.param("batch_size", 8),
            ),
            {"accelerator": "v5litepod-8"},
            "mesh.fsdp is chosen for the accelerator",
        ),
        (
            space.isoflop([5e11], space.product(WIDTHS, MUP)),
            {"rule": RuleConfig("square_root_batch")},
            "mup carries over the base model's learning rate, which rule.name=square_root_batch",
        ),
    ],
)
def test_plan_refuses(points, changes, words, tmp_path, monkeypatch):
    if changes.get("unique_tokens") == 0.0:
        monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        make(points, **changes)


def test_plan_warns_of_minimum_near_the_edge():
    (warning,) = make(space.isoflop([5e11], space.param("width", 16, 24, 32, 48))).warnings
    assert "3 lie below and 1 above the expected minimum" in warning


def test_plan_warns_of_a_single_size():
    (warning,) = make(space.isoflop([5e11], space.param("width", 32))).warnings
    assert warning == "budget 5e+11: has one size; its minimum is unknown"


def test_point_needs_one_length():
    for values in ({}, {"tokens": 1e6, "budget": 1e12}):
        with pytest.raises(UserError, match=r"set one of them, and the others to 0"):
            make_points([{"width": 32, **values}])


def test_extended_plan_keeps_runs(tmp_path):
    first = make(space.isoflop([5e11], WIDTHS))
    tmp_path = tmp_path / "sweep"
    extend_sweep(tmp_path, first)
    assert read_sweep(tmp_path) == first
    more = make(space.isoflop([5e11, 1e12], WIDTHS), tokens_per_param=8)
    extend_sweep(tmp_path, more)
    assert read_sweep(tmp_path) == more
    with pytest.raises(UserError, match=r"run c1e12-w16 is missing"):
        extend_sweep(tmp_path, first)
    other = make(space.isoflop([5e11, 1e12], WIDTHS), tokens_per_param=8, rule=RuleConfig(end_fraction=0.2))
    with pytest.raises(UserError, match=r"run c5e11-w16 has changed"):
        extend_sweep(tmp_path, other)


def test_manifest_refuses_nonsense(tmp_path):
    run = Run("a", "runs/a", 10, 5, 100, 1e4, 10)
    with pytest.raises(UserError, match="'a' is the name of 2 runs"):
        Sweep(1, (run, run))
    with pytest.raises(UserError, match="a has trunk='b', which is no run"):
        Sweep(1, (dataclasses.replace(run, trunk="b", trunk_step=3),))
    with pytest.raises(UserError, match=r"no sweep.json in this folder"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 1, "runs": [{"name": "a"}]}')
    with pytest.raises(UserError, match=r"sweep.json"):
        read_sweep(tmp_path)
