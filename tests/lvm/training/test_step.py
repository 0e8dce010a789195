"""The compiled step: same numbers on every mesh and with ZeRO-1, shardings, donation."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from lvm.hardware.sharding import MeshConfig
from lvm.model.parametrization import ParametrizationConfig
from lvm.training import step
from lvm.training.optimizer import build
from tests.commands import ROOT
from tests.small_step import ADAMW, CONFIG, HELDOUT, OPTIMIZERS, batch, make_step, sgd

MESHES = {
    "8×1": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "2×4 with tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "2×2×2 with sequence": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "sequence 4": MeshConfig(data=2, fsdp=1, sequence=4),
    "all four axes but one": MeshConfig(data=2, fsdp=2, sequence=2),
}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def fresh(kind):
    """A state from one device: compiling `init` for every mesh would dominate the time of these tests."""
    return jax.device_get(make_step(None, OPTIMIZERS[kind]()).init())


@functools.cache
def single_device(kind):
    """Twenty steps of AdamW or gradient descent on one device."""
    return run(make_step(None, OPTIMIZERS[kind]()), kind, 20)


def run(step, kind, count):
    """Returns the losses, and the state and the metrics of the first step."""
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh(kind), step.state)
    losses, first = [], None
    for index in range(count):
        state, metrics = step(state, step.shard_batch(batch(index)))
        losses.append(float(metrics["loss"]))
        first = first or jax.device_get((state, metrics))
    return losses, *first


def assert_near(actual, expected):
    """‖a − b‖₂ ≤ 1e-5 · ‖b‖₂ for every array."""
    for (path, b), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


# Quickly where `test_mesh_changes_no_losses_or_moments` doesn't compare the first moments, linear in the gradient.
@pytest.mark.parametrize(
    "mesh", [name if name == "fsdp 8" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_mesh_changes_no_gradient(mesh):
    _, after, metrics = run(make_step(MESHES[mesh], sgd()), "sgd", 1)
    _, expected, expected_metrics = single_device("sgd")
    change = lambda state: jax.tree.map(np.subtract, state["params"], fresh("sgd")["params"])  # noqa: E731
    assert_near(change(after), change(expected))  # gradients times the learning rate
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("all four axes but one", {"zero1": True}),
        ("2×2×2 with sequence", {"accumulate_steps": 4}),
        pytest.param("2×4 with tensor", {}, marks=pytest.mark.slow),
        pytest.param("8×1", {"zero1": True}, marks=pytest.mark.slow),
    ],
)
def test_mesh_changes_no_losses_or_moments(mesh, options):
    losses, first, _ = run(make_step(MESHES[mesh], **options), "adamw", 20)
    expected_losses, expected, _ = single_device("adamw")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert expected_losses[-1] < expected_losses[0]
    assert_near(first["training"], expected["training"])  # moments after a step


def make_parametrized_step(mesh):
    config = dataclasses.replace(CONFIG, parametrization=ParametrizationConfig("completep", 16, 1))
    return make_step(mesh, build(ADAMW, 100, model=config), config=config)


def test_parametrized_moments_are_sharded_as_parameters():
    state = make_parametrized_step(MESHES["2×4 with tensor"]).state
    for name in ("mu", "nu"):
        moments = optax.tree.get(state["training"]["optimizer"], name)
        placed = [jax.tree.map(lambda x: x.sharding, tree) for tree in (moments, state["params"])]
        assert placed[0] == placed[1]
    assert not state["params"]["layers"]["mlp"]["up"].sharding.is_fully_replicated


@pytest.mark.slow
def test_mesh_changes_no_parametrized_training():
    single, sharded = (make_parametrized_step(mesh) for mesh in (None, MESHES["2×4 with tensor"]))
    initial, states = jax.device_get(single.init()), []
    for run_step in (single, sharded):
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), initial, run_step.state)
        for index in range(3):
            state, _ = run_step(state, run_step.shard_batch(batch(index)))
        states.append(jax.device_get(state))
    assert_near(states[1], states[0])


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        ({"data": 1, "fsdp": 4}, "sgd"),  # compiles in half of the time; its losses depend on the gradients' scale too
        pytest.param({"data": 1, "fsdp": 4}, "adamw", marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 1, "sequence": 2}, "adamw", marks=pytest.mark.slow),
    ],
)
def test_process_count_changes_no_losses(mesh, kind):
    # Two processes of two devices each; the sequence, or the parameters, split across them.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", "tests.small_step", kind, address, "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen([*arguments, str(index), json.dumps(mesh)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for index in range(2)
    ]
    outputs = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    expected_losses, _, expected_metrics = single_device(kind)
    expected_heldout_loss = evaluate(make_step(None))
    for output in outputs:
        assert output["devices"] == 4
        assert output["broadcast"] == [2**40 + 5, -1]
        np.testing.assert_allclose(output["losses"], expected_losses, rtol=1e-5)
        for name in ("grad_norm", "param_norm"):
            np.testing.assert_allclose(output[name], expected_metrics[name], rtol=1e-5)
        np.testing.assert_allclose(output["heldout_loss"], expected_heldout_loss, rtol=1e-5)
    assert outputs[0] == outputs[1]


def evaluate(step):
    """The held-out loss of a fresh state, from the rows of this process's devices."""
    heldout = [{name: x[step.rows] for name, x in batch(seed).items()} for seed in HELDOUT]
    task = dataclasses.replace(step.task, heldout=heldout)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh("adamw"), step.state)
    return task.evaluate(state)["heldout_loss"]


@pytest.mark.parametrize(
    ("mesh", "accumulate_steps"),
    [
        ("2×2×2 with sequence", 2),
        ("sequence 4", 1),
        pytest.param("2×2×2 with sequence", 1, marks=pytest.mark.slow),
        pytest.param("sequence 4", 2, marks=pytest.mark.slow),
    ],
)
def test_heldout_loss_has_the_bits_of_replicated_batches(mesh, accumulate_steps):
    step = make_step(MESHES[mesh], accumulate_steps=accumulate_steps)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh("adamw"), step.state)
    total = weight = 0.0
    for seed in HELDOUT:
        for index in range(accumulate_steps):
            micro_batch = {name: x[index::accumulate_steps] for name, x in batch(seed).items()}
            sums = step.task._loss_sum(state["params"], micro_batch)
            total, weight = total + float(sums[0]), weight + float(sums[1])
    assert evaluate(step) == total / weight


@pytest.mark.parametrize("mesh", ["fsdp 8", "2×2×2 with sequence"])
def test_init_on_mesh_equals_one_device(mesh):
    step = make_step(MESHES[mesh])
    for (path, expected), leaf in zip(
        jax.tree.leaves_with_path(fresh("adamw")), jax.tree.leaves(step.init()), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_init_never_holds_whole_state_on_a_device():
    step = make_step(MESHES["fsdp 8"])
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state))
    memory = step.jitted_init().lower().compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 4
    query = step.state["params"]["layers"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape) == (2, 32 // 8, 4, 8)


def test_zero1_shards_moments_and_replicates_parameters():
    step = make_step(MESHES["8×1"], zero1=True)
    assert step.state["params"]["embedding"].sharding.is_fully_replicated
    moments = [x for x in jax.tree.leaves(step.state["training"]) if x.shape == (64, 32)]
    assert len(moments) == 2
    assert {x.sharding.shard_shape(x.shape) for x in moments} == {(8, 32)}


def test_state_is_donated_and_step_compiled_once():
    compiled = []
    listen = lambda event, _, **info: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    step = make_step(MESHES["2×2×2 with sequence"], accumulate_steps=4)  # whose program is in the cache
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh("adamw"), step.state)
    batches = [step.shard_batch(batch(index)) for index in range(3)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    for current in batches:
        donated, (state, _) = state, step(state, current)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
    memory = step.compile().memory_analysis()
    state_bytes = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= state_bytes
    assert memory.temp_size_in_bytes > 0
    # The old and the new state share their buffers; the rest is the batch and the metrics.
    assert state_bytes < step.memory_bytes() - memory.temp_size_in_bytes < 1.5 * state_bytes


def test_cache_events_are_logged(caplog):
    step._log_cache_events()
    for event in ("cache_hits", "cache_misses", "other"):
        jax.monitoring.record_event(f"/jax/compilation_cache/{event}")
    messages = ["compiled program found in the cache", "compiled program not in the cache; added"]
    assert [message for message in caplog.messages if "compiled program" in message] == messages
