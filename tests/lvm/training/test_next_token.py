"""Next-token loss and updates, against the same sums in NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, logsumexp

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.nnx_utils import merge
from lvm.model.transformer import ModelConfig
from lvm.training.next_token import NextTokenTask, ObjectiveConfig
from lvm.training.task import weighted_means

CONFIG = ModelConfig(
    hidden_size=8, mlp_size=16, num_layers=2, num_heads=2, vocabulary_size=20, context=6,
    init_std=0.5, dtype="float32", attention="xla",
)  # fmt: skip
B, C = 3, 6


@functools.cache
def objective(heldout=0, num_codes=None):
    spec = {
        "tokens": jax.ShapeDtypeStruct((B, C + 1), np.int32),
        "loss_mask": jax.ShapeDtypeStruct((B, C), np.bool_),
        "positions": jax.ShapeDtypeStruct((B, C), np.int32),
        "component_ids": jax.ShapeDtypeStruct((B, C), np.int16),
    }
    schedule = optax.constant_schedule(0.01)
    batches = [batch(seed) for seed in range(100, 100 + heldout)]
    return NextTokenTask(
        CONFIG, spec, ["cats", "dogs", "owls"], optax.sgd(schedule), schedule, heldout=batches, num_codes=num_codes
    )


@functools.cache
def compiled(name):
    return jax.jit(getattr(objective(), name))


@functools.cache
def state(seed=0):
    return compiled("init")(jax.random.key(seed, impl="rbg"))  # compiles faster than the default


def batch(seed=0, mask=True):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 20, (B, C + 1), dtype=np.int32),
        "loss_mask": rng.random((B, C)) < 0.6 if mask else np.ones((B, C), bool),
        "positions": np.tile(np.arange(C, dtype=np.int32), (B, 1)),
        "component_ids": rng.integers(0, 2, (B, C), dtype=np.int16),  # never owls
    }


@jax.jit
def _logits(params, tokens, positions):
    return merge(objective().graphdef, params)(tokens, positions, "xla")


def numpy_losses(example):
    logits = _logits(state()["params"], example["tokens"][:, :-1], example["positions"])
    likelihoods = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return -np.take_along_axis(likelihoods, example["tokens"][:, 1:, None], -1)[..., 0]


@jax.jit
def _means(params, example):
    return weighted_means(objective()._loss(params, example, jax.random.key(0))[1])


def loss_of(example):
    metrics = {name: float(value) for name, value in _means(state()["params"], example).items()}
    return metrics.pop("loss"), metrics


def test_loss_is_mean_over_unmasked_targets():
    example = batch()
    expected = numpy_losses(example)[example["loss_mask"]].mean()
    np.testing.assert_allclose(loss_of(example)[0], expected, rtol=1e-5)


def test_component_loss_is_mean_over_its_targets():
    example = batch()
    losses, metrics = numpy_losses(example), loss_of(example)[1]
    assert set(metrics) == {"loss/cats", "loss/dogs", "loss/owls"}
    for index, name in enumerate(("cats", "dogs")):
        counted = example["loss_mask"] & (example["component_ids"] == index)
        np.testing.assert_allclose(metrics[f"loss/{name}"], losses[counted].mean(), rtol=1e-5)
    assert np.isnan(metrics["loss/owls"])


def test_component_loss_counts_codes_alone():
    """A batch may hold no more of a component than its EOS, which is certain; the loss itself counts all targets."""
    example = batch(mask=False)
    example["component_ids"][:] = 0
    example["tokens"] %= 18
    example["tokens"][:, 2], example["component_ids"][:, 1] = 18, 1  # the only targets of dogs
    sums = jax.jit(objective(num_codes=18)._loss)(state()["params"], example, jax.random.key(0))[1]
    losses = numpy_losses(example)
    cats = np.delete(losses, 1, axis=1)
    np.testing.assert_allclose(sums["loss/cats"][0] / sums["loss/cats"][1], cats.mean(), rtol=1e-5)
    assert sums["loss/dogs"][1] == 0
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], losses.mean(), rtol=1e-5)


def test_masked_targets_do_not_count():
    example = batch()
    row, position = np.argwhere(~example["loss_mask"] & (np.arange(C) == C - 1))[0]  # the last: no input sees it
    other = {**example, "tokens": example["tokens"].copy()}
    other["tokens"][row, position + 1] = (other["tokens"][row, position + 1] + 1) % 20
    np.testing.assert_equal(loss_of(other), loss_of(example))
    other["loss_mask"] = example["loss_mask"].copy()
    other["loss_mask"][row, position] = True
    assert loss_of(other)[0] != loss_of(example)[0]


def test_batch_without_targets_has_zero_loss():
    example = batch()
    example["loss_mask"] = np.zeros((B, C), bool)
    assert loss_of(example)[0] == 0


def test_update_descends_and_counts_steps():
    example, update = batch(mask=False), compiled("update")
    current, losses = state(), []
    for _ in range(5):
        current, metrics = update(current, example, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5
    assert int(current["step"]) == 5
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)


def test_norms_cover_all_gradients_and_parameters():
    example, before = batch(), state()["params"]
    after, metrics = compiled("update")(state(), example, jax.random.key(0))
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))  # noqa: E731
    updates = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after["params"])
    np.testing.assert_allclose(metrics["grad_norm"], norm(updates) / 0.01, rtol=1e-3)  # plain gradient descent
    np.testing.assert_allclose(metrics["param_norm"], norm(after["params"]), rtol=1e-5)


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_heldout_loss_is_mean_over_all_targets(accumulate_steps):
    batches = [batch(seed) for seed in (100, 101)]
    expected = np.concatenate([numpy_losses(x)[x["loss_mask"]] for x in batches]).mean()
    task = dataclasses.replace(objective(heldout=2), objective=ObjectiveConfig(accumulate_steps=accumulate_steps))
    assert task.evaluate(state()) == {"heldout_loss": pytest.approx(expected, rel=1e-5)}
    assert task.evaluate(state(), stopping=lambda: True) == {}
    assert objective().evaluate(state()) == {}


def test_init_depends_on_key_alone():
    again = compiled("init")(jax.random.key(0, impl="rbg"))
    np.testing.assert_array_equal(again["params"]["head"], state()["params"]["head"])
    assert not np.array_equal(state(seed=1)["params"]["head"], state()["params"]["head"])


def test_pictures_are_replaceable():
    assert objective().pictures(state()) == {}
    picture = np.full((2, 3, 3), 7, np.uint8)
    task = dataclasses.replace(objective(), pictures=lambda state: {"x": picture + np.uint8(state["step"])})
    np.testing.assert_array_equal(task.pictures(state())["x"], picture)


def test_unavailable_kernel_is_refused():
    with pytest.raises(UserError, match="attention=cudnn needs a GPU, this is cpu"):
        dataclasses.replace(objective(), config=dataclasses.replace(CONFIG, attention="cudnn"))


def test_z_loss_is_added_to_minimized_total():
    example = batch()
    weighted = dataclasses.replace(objective(), objective=ObjectiveConfig(z_loss=0.1))
    total, sums = jax.jit(weighted._loss)(state()["params"], example, jax.random.key(0))
    logits = np.asarray(_logits(state()["params"], example["tokens"][:, :-1], example["positions"]), np.float64)
    log_z = logsumexp(logits, axis=-1)[example["loss_mask"]]
    np.testing.assert_allclose(total, sums["loss"][0] + 0.1 * np.sum(log_z**2), rtol=1e-5)


def test_accumulated_gradients_equal_whole_batch():
    # Masks differ between micro-batches, so a mean of means would differ.
    example = batch()
    accumulating = dataclasses.replace(objective(), objective=ObjectiveConfig(accumulate_steps=3))
    whole_state, whole = compiled("update")(state(), example, jax.random.key(0))
    accumulated, metrics = jax.jit(accumulating.update)(state(), example, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(accumulated["params"]), jax.tree.leaves(whole_state["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for name, value in whole.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_segments_of_one_row_are_independent():
    # Two sentences in a row give what each gives alone.
    spec = {**objective().batch_spec, "segment_ids": jax.ShapeDtypeStruct((B, C), np.int32)}
    segmented = dataclasses.replace(objective(), batch_spec=spec)
    example = batch(mask=False)
    example["positions"] = np.tile(np.array([0, 1, 2, 0, 1, 2], np.int32), (B, 1))
    example["segment_ids"] = np.tile(np.array([1, 1, 1, 2, 2, 2], np.int32), (B, 1))
    total, _ = jax.jit(segmented._loss)(state()["params"], example, jax.random.key(0))
    halves = 0.0
    for half in (slice(0, 3), slice(3, 6)):
        logits = _logits(state()["params"], example["tokens"][:, :-1][:, half], example["positions"][:, half])
        likelihoods = log_softmax(np.asarray(logits, np.float64), axis=-1)
        halves -= np.take_along_axis(likelihoods, example["tokens"][:, 1:][:, half, None], -1).sum()
    np.testing.assert_allclose(total, halves, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        (MeshConfig(fsdp=2, sequence=4), {"accumulate_steps": 2}, "batch_size: 6 .* = 1 × 2 × 2"),
        (MeshConfig(data=2, sequence=4), {}, "sequence: 4 doesn't divide the context of 6"),
    ],
)
def test_mesh_that_does_not_divide_batch_is_refused(mesh, options, message):
    spec = {name: jax.ShapeDtypeStruct((6, *x.shape[1:]), x.dtype) for name, x in objective().batch_spec.items()}
    changes = {"batch_spec": spec, "mesh": make_mesh(mesh), "objective": ObjectiveConfig(**options)}
    with pytest.raises(UserError, match=message):
        dataclasses.replace(objective(), **changes)


@pytest.mark.parametrize("change", [{"z_loss": -1.0}, {"logits_chunk": 0}, {"accumulate_steps": 0}])
def test_objective_config_names_bad_field(change):
    with pytest.raises(UserError, match=f"{next(iter(change))}="):
        ObjectiveConfig(**change)
