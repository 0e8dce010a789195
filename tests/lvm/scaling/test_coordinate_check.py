"""Coordinate check: models of several widths, their activations, and what the command writes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm import sweep
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Video
from lvm.model.nnx_utils import abstract_module, init_params, merge
from lvm.model.parametrization import ParametrizationConfig
from lvm.model.transformer import ModelConfig, Transformer
from lvm.scaling import coordinate_check
from lvm.training.config import TrainConfig
from lvm.training.optimizer import OptimizerConfig

MODEL = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=1, num_heads=4, num_kv_heads=2, context=16, dtype="float32", init_std=0.2
)
CONFIG = TrainConfig(model=MODEL, optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0))
MUP = dataclasses.replace(
    CONFIG, model=dataclasses.replace(MODEL, parametrization=ParametrizationConfig("mup", base_width=32))
)


def make_batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 8, (4, 17), dtype=np.int32)
    return {
        "tokens": tokens,
        "loss_mask": np.ones((4, 16), bool),
        "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
        "component_ids": np.zeros((4, 16), np.int16),
    }


def slopes(config):
    check = coordinate_check.coordinate_check(config, make_batch(), 40, (32, 256), steps=2)
    assert check.widths == (32, 256)
    assert all(values.shape == (3, 2) for values in (*check.sizes.values(), *check.changes.values()))
    assert all(not values[0].any() for values in check.changes.values())
    return {name: (size, change) for name, _, size, change in check.table()}


@pytest.mark.slow
def test_activations_are_flat_under_mup_alone():
    mup, standard = slopes(MUP), slopes(CONFIG)
    assert all(abs(change) < 0.2 for _, change in mup.values()), mup
    assert all(abs(mup[name][0]) < 0.2 for name in ("embedding", "attention", "mlp", "hidden")), mup
    assert all(standard[name][1] > 0.4 for name in ("scores", "attention", "mlp", "hidden", "logits")), standard


def test_at_width_keeps_head_dim_and_proportions():
    wide = coordinate_check.at_width(MODEL, 96)
    assert (wide.hidden_size, wide.mlp_size, wide.num_heads, wide.num_kv_heads, wide.head_dim) == (96, 144, 12, 6, 8)
    assert coordinate_check.at_width(MODEL, 32) == MODEL


@pytest.mark.parametrize(("widths", "problem"), [((32,), "at least two"), ((32, 40), "40 is not a multiple of 16")])
def test_coordinate_check_names_bad_width(widths, problem):
    with pytest.raises(UserError, match=f"^widths: .*{problem}"):
        coordinate_check.coordinate_check(CONFIG, make_batch(), 40, widths)


def test_activations_end_in_logits_of_model():
    config = dataclasses.replace(MODEL, vocabulary_size=40)
    make = lambda rngs: Transformer(config, rngs, stacked=False)  # noqa: E731
    model = merge(abstract_module(make)[0], jax.jit(lambda: init_params(make, jax.random.key(0)))())
    tokens, positions = jnp.asarray(make_batch()["tokens"][:, :-1]), jnp.asarray(make_batch()["positions"])
    outputs = jax.jit(lambda: coordinate_check.activations(model, tokens, positions, "xla"))()
    hidden, _ = jax.jit(lambda: model.prefill(tokens, positions, "xla"))()
    assert set(outputs) == set(coordinate_check.MODULES)
    np.testing.assert_allclose(outputs["hidden"], hidden, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], model.logits(hidden), atol=1e-5)
    branches = outputs["attention"].sum(0) + outputs["mlp"].sum(0)
    np.testing.assert_allclose(outputs["embedding"] + branches, hidden, atol=1e-5)


def test_coordinate_check_command_names_bad_width(tmp_path, capsys):
    arguments = ["--config=configs/demo_lvm.py", f"--out={tmp_path}", "--widths=64,wide"]
    assert sweep.main(["coordinate-check", *arguments]) == 2
    assert "--widths: 'wide'" in capsys.readouterr().err


def test_run_writes_sizes_and_plot(make_store, tmp_path):
    data = MixtureConfig({"video": ComponentConfig(Video(frames=2, strides=(1,)))}, (make_store([(4, 0)] * 9),))
    config = dataclasses.replace(CONFIG, data=data, batch_size=2)
    check = coordinate_check.run(config, tmp_path / "out", (32, 64), 1)
    written = json.loads((tmp_path / "out" / coordinate_check.RESULTS).read_text())
    assert written["widths"] == [32, 64]
    assert written["parametrization"]["name"] == "standard"
    assert written["changes"]["logits"] == check.changes["logits"].tolist()
    _, before, after, change = next(row for row in check.table() if row[0] == "mlp")  # slopes from width 32 to 64
    narrow, wide = (check.sizes["mlp"][:, index] for index in (0, 1))
    np.testing.assert_allclose([before, after], np.log2(wide / narrow), rtol=1e-5)
    assert change == pytest.approx(np.log2(check.changes["mlp"][1, 1] / check.changes["mlp"][1, 0]))
    assert (tmp_path / "out" / coordinate_check.PLOT).read_bytes().startswith(b"\x89PNG")
