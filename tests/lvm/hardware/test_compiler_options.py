"""XLA compiler options: tables, overrides, errors, and their record in a workdir."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.hardware.compiler_options import (
    DEFAULT_OPTIONS,
    DETERMINISM_COST,
    DETERMINISTIC_OPTIONS,
    compiler_options,
    option_error,
)
from lvm.hardware.sharding import MeshConfig
from lvm.model.transformer import ModelConfig
from lvm.train import train
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig
from lvm.training.step import Step
from tests import small_step


@pytest.mark.parametrize("table", [DEFAULT_OPTIONS, DETERMINISTIC_OPTIONS])
def test_tables_give_every_option_a_reason(table):
    assert set(table) == {"tpu", "gpu", "cpu"} == set(DETERMINISM_COST)
    for options in table.values():
        assert all(reason and name.startswith("xla_") for name, (_, reason) in options.items())


def test_overrides_replace_table_values():
    name = "xla_tpu_enable_latency_hiding_scheduler"
    assert compiler_options("tpu")[name] is True
    assert compiler_options("tpu", f"{name}=false xla_tpu_a=3 xla_tpu_b=0.5 xla_tpu_c=fast") == {
        **compiler_options("tpu"),
        name: False,
        "xla_tpu_a": 3,
        "xla_tpu_b": 0.5,
        "xla_tpu_c": "fast",
    }
    assert name not in compiler_options("tpu", f"{name}=")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("xla_a", r"config\.compiler_options: 'xla_a'"),
        ("=3", r"config\.compiler_options: '=3'"),
        ("xla_a=1 xla_a=2", r"config\.compiler_options: xla_a is set twice"),
    ],
)
def test_overrides_reject_malformed_and_duplicate(overrides, message):
    with pytest.raises(UserError, match=message):
        compiler_options("cpu", overrides)


def test_deterministic_adds_options_on_gpu_only():
    assert compiler_options("gpu", deterministic=True)["xla_gpu_deterministic_ops"] is True
    assert (
        compiler_options("gpu", "xla_gpu_deterministic_ops=false", deterministic=True)["xla_gpu_deterministic_ops"]
        is False
    )
    assert compiler_options("tpu", deterministic=True) == compiler_options("tpu")
    assert compiler_options("cpu", deterministic=True) == {}


@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_options_exist_in_the_compiler(deterministic):
    # The compiler knows one list of options for all platforms but TPU, and rejects unknown ones.
    program = jax.jit(lambda x: x + 1).lower(jnp.ones(2))
    compiled = program.compile(compiler_options("gpu", deterministic=deterministic))
    np.testing.assert_array_equal(compiled(jnp.ones(2)), [2, 2])


def test_step_defaults_to_platform_options():
    assert small_step.make_step(None).compiler_options == compiler_options("cpu") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xla_nothing": True}, r"^config\.compiler_options: xla_nothing: .* no such option$"),
        (
            {"xla_cpu_enable_fast_math": "perhaps"},
            r"^config\.compiler_options: xla_cpu_enable_fast_math=perhaps: .*'perhaps' is not a valid bool",
        ),
    ],
)
def test_step_names_options_the_compiler_rejects(options, message):
    step = small_step.make_step(MeshConfig(fsdp=2))
    with pytest.raises(UserError, match=message):
        Step(step.task, step.mesh, 0, options=options).compile()


def test_option_error_ignores_other_errors():
    assert option_error("RESOURCE_EXHAUSTED: xla_a", {"xla_a": 1}) is None


@pytest.mark.slow
def test_run_records_options_and_resumes_with_others(make_store, tmp_path):
    store = make_store([(1, 0)] * 40)
    manifest = pathlib.Path(store, "manifest.json")
    files.write_json(manifest, files.read_json(manifest) | {"source": {}})
    config = TrainConfig(
        batch_size=jax.device_count(),
        model=ModelConfig(
            hidden_size=16,
            mlp_size=16,
            num_layers=1,
            num_heads=2,
            context=8,
            dtype="float32",
            attention="xla",
        ),
        data=MixtureConfig({"images": ComponentConfig(Single())}, store=(store,), heldout_fraction=0.0),
        optimizer=OptimizerConfig(warmup_steps=1),
        mesh=MeshConfig(data=jax.device_count()),
        loop=LoopConfig(total_steps=2, log_every=1),
        compiler_options="xla_cpu_enable_fast_math=false",
    )
    train(config, str(tmp_path / "run"))
    record = files.read_json(tmp_path / "run" / "config.json")
    assert record["compiler_options"] == {"xla_cpu_enable_fast_math": False}
    more = dataclasses.replace(config.loop, total_steps=3)
    train(dataclasses.replace(config, compiler_options="", deterministic=True, loop=more), str(tmp_path / "run"))
    assert files.read_json(tmp_path / "run" / "config.json")["compiler_options"] == {}
    more = dataclasses.replace(config.loop, total_steps=4)
    wrong = dataclasses.replace(config, compiler_options="xla_nothing=1", loop=more)
    with pytest.raises(UserError, match=r"config\.compiler_options: xla_nothing: "):
        train(wrong, str(tmp_path / "run"))
