"""Memory of a step: remat policies that fit, limits and advice."""

import dataclasses
import functools

import jax
import pytest

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import memory
from lvm.training.memory import explain_out_of_memory, find_fitting_step, format_breakdown, memory_limit
from tests.small_step import CONFIG, make_step, sgd


@pytest.fixture(scope="module")
def needs():
    """Bytes that a step needs with each policy."""
    return {policy: make(policy, 1).memory_bytes() for policy in ("none", "full")}


@functools.cache  # each is compiled once
def make(policy, accumulate_steps):
    config = dataclasses.replace(CONFIG, remat=policy)
    return make_step(None, sgd(), config=config, accumulate_steps=accumulate_steps)


def choose(monkeypatch, limit, policy="auto"):
    monkeypatch.setattr(memory.accelerators, "memory_bytes", lambda device: limit)
    attempts = []

    def recording(*arguments):
        attempts.append(arguments)
        return make(*arguments)

    return find_fitting_step(recording, policy, 1), attempts


def test_auto_remat_keeps_all_if_it_fits(monkeypatch):
    step, attempts = choose(monkeypatch, 2**40)
    assert step.task.config.remat == "none"
    assert attempts == [("none", 1)]


def test_auto_remat_picks_heavier_policy_if_needed(monkeypatch, needs):
    assert needs["full"] < 0.95 * needs["none"]
    step, attempts = choose(monkeypatch, needs["none"])  # of which 5 % must stay free
    assert step.task.config.remat == attempts[-1][0] != "none"
    assert step.memory_bytes() <= 0.95 * needs["none"]


def test_policy_that_does_not_fit_names_one_that_does(monkeypatch, needs):
    with pytest.raises(UserError) as error:
        choose(monkeypatch, needs["full"] * 1.1, "none")
    message = str(error.value)
    assert "config.model.remat=none doesn't fit in 0.00 GiB a device (GiB needed: none 0.00; parameters 0.00" in message
    assert message.endswith("GiB)")
    assert "config.objective.accumulate_steps=1 would fit" in message


@pytest.mark.slow
def test_nothing_fits_suggests_fsdp(monkeypatch):
    with pytest.raises(
        UserError, match=r"none 0\.00, dots 0\.00, attention 0\.00, full 0\.00; .*a larger config.mesh.fsdp"
    ):
        choose(monkeypatch, 1000)


def test_format_breakdown_adds_up(monkeypatch):
    monkeypatch.setattr(memory, "_GIB", 1)  # the sizes are in bytes
    step = make_step(MeshConfig(data=1, fsdp=8))
    parts = [part.rpartition(" ") for part in format_breakdown(step).split(", ")]
    sizes = {name: float(size) for name, _, size in parts}
    assert list(sizes) == ["parameters", "optimizer", "batch", "temporaries"]
    assert sizes["batch"] == 4 * 17 + 16 + 4 * 16 + 2 * 16  # one row
    assert 2 * sizes["parameters"] <= sizes["optimizer"] <= 2 * sizes["parameters"] + 64  # two moments and counts
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.state["params"]))
    assert whole / 8 <= sizes["parameters"] < whole / 4  # the norms are replicated
    assert sum(sizes.values()) == step.memory_bytes()


def test_auto_remat_needs_known_accelerator(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda mesh: None)
    with pytest.raises(UserError, match="remat=auto: the memory of 'cpu'"):
        find_fitting_step(make, "auto", 1)
    assert find_fitting_step(make, "full", 1).task.config.remat == "full"


def test_memory_limit_of_cpu_is_machine_memory():
    one, two = (make_mesh(MeshConfig(), jax.devices()[:count]) for count in (1, 2))
    assert memory_limit(two) == pytest.approx(memory_limit(one) / 2)
    assert memory_limit(two) > 2**28


def test_explain_out_of_memory_suggests_settings(monkeypatch):
    advice = explain_out_of_memory(make, make("none", 1), "none", 1)
    assert advice.startswith("the step alone needs 0.00 GiB a device (parameters 0.00, optimizer 0.00, batch 0.00")
    assert " would fit (0.00 GiB)" in advice
    assert "config.model.remat=none with config.objective.accumulate_steps=1 " not in advice
