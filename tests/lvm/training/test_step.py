"""The compiled step: what a mesh, rematerialisation and ZeRO-1 leave as it was, and where everything lies."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lvm.hardware.sharding import MeshConfig
from tests.commands import ROOT
from tests.small_step import OPTIMIZERS, batch, make_step, sgd

MESHES = {
    "8×1": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "2×4 with tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "2×2×2 with sequence": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "sequence 4": MeshConfig(data=2, fsdp=1, sequence=4),
    "all four axes but one": MeshConfig(data=2, fsdp=2, sequence=2),
}


pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def fresh(kind):
    """A state as one device makes it: compiling `init` for every mesh would take longer than all the rest."""
    return jax.device_get(make_step(None, OPTIMIZERS[kind]()).init())


@functools.cache
def alone(kind):
    """Twenty AdamW losses, or one update by gradient descent, on one device."""
    return run(make_step(None, OPTIMIZERS[kind]()), kind, 1 if kind == "sgd" else 20)


def run(step, kind, count):
    """The losses, the last state and the last metrics; with the state after the first step before them."""
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh(kind), step.state)
    losses, first = [], None
    for number in range(count):
        state, metrics = step(state, step.shard_batch(batch(number)))
        losses.append(float(metrics["loss"]))
        first = jax.device_get(state) if first is None else first
    return losses, first, metrics


def assert_near(found, wanted):
    """‖a − b‖₂ ≤ 1e-5 · ‖b‖₂ for every array."""
    for (path, b), a in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_a_mesh_changes_no_gradient(mesh):
    _, after, metrics = run(make_step(mesh, sgd()), "sgd", 1)
    _, wanted, wanted_metrics = alone("sgd")
    moved = lambda state: jax.tree.map(np.subtract, state["params"], fresh("sgd")["params"])  # noqa: E731
    assert_near(moved(after), moved(wanted))  # the gradients, times the learning rate
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("8×1", {"zero1": True}),
        ("2×4 with tensor", {}),
        ("2×2×2 with sequence", {"accumulate_steps": 4}),
        ("all four axes but one", {"zero1": True}),
    ],
)
def test_a_mesh_changes_no_run(mesh, options):
    losses, first, _ = run(make_step(MESHES[mesh], **options), "adamw", 20)
    wanted_losses, wanted, _ = alone("adamw")
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert wanted_losses[-1] < wanted_losses[0]
    assert_near(first["training"], wanted["training"])  # the moments after a step


@pytest.mark.parametrize(
    "mesh",
    [{"data": 1, "fsdp": 4}, pytest.param({"data": 2, "fsdp": 1, "sequence": 2}, marks=pytest.mark.slow)],
)
def test_processes_change_no_run(mesh):
    # Two processes of two devices each; the sequence, or the parameters, split across them.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", "tests.small_step", address, "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [*arguments, str(number), json.dumps(mesh)], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    outputs = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    wanted_losses, _, _ = alone("adamw")
    for found in outputs:
        assert found["devices"] == 4
        assert found["agreed"] == [2**40 + 5, -1]
        np.testing.assert_allclose(found["losses"], wanted_losses, rtol=1e-5)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("mesh", ["fsdp 8", "2×2×2 with sequence"])
def test_a_state_is_made_where_it_lives(mesh):
    step = make_step(MESHES[mesh])
    for (path, wanted), leaf in zip(
        jax.tree.leaves_with_path(fresh("adamw")), jax.tree.leaves(step.init()), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_no_device_ever_holds_the_whole_state():
    step = make_step(MESHES["fsdp 8"])
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state))
    memory = step.jitted_init().lower().compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 4
    query = step.state["params"]["layers"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape) == (2, 32 // 8, 4, 8)


def test_zero1_splits_the_moments_over_data_and_leaves_the_parameters_whole():
    step = make_step(MESHES["8×1"], zero1=True)
    assert step.state["params"]["embedding"].sharding.is_fully_replicated
    moments = [x for x in jax.tree.leaves(step.state["training"]) if x.shape == (64, 32)]
    assert len(moments) == 2
    assert {x.sharding.shard_shape(x.shape) for x in moments} == {(8, 32)}


def test_the_state_is_donated_and_the_step_compiled_once():
    compiled = []
    listen = lambda event, _, **info: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    step = make_step(MESHES["fsdp 8"])
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh("adamw"), step.state)
    batches = [step.shard_batch(batch(number)) for number in range(3)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    for made in batches:
        given, (state, _) = state, step(state, made)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
    memory = step.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
    )
