import dataclasses

import jax
import pytest

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import memory
from lvm.training.memory import explain_out_of_memory, find_fitting_step, format_breakdown, memory_limit
from tests.small_step import CONFIG, make_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture
def needs():
    """Bytes that each policy needs."""
    return {policy: make(policy, 1).memory_bytes() for policy in ("none", "full")}


def make(policy, parts):
    return make_step(None, config=dataclasses.replace(CONFIG, remat=policy), accumulate_steps=parts)


def choose(monkeypatch, limit, policy="auto"):
    monkeypatch.setattr(memory.accelerators, "memory_bytes", lambda device: limit)
    tried = []

    def recording(*arguments):
        tried.append(arguments)
        return make(*arguments)

    return find_fitting_step(recording, policy, 1), tried


def test_all_is_kept_where_there_is_room(monkeypatch):
    step, tried = choose(monkeypatch, 2**40)
    assert step.task.config.remat == "none"
    assert tried == [("none", 1)]


def test_less_is_kept_where_there_is_less(monkeypatch, needs):
    assert needs["full"] < 0.95 * needs["none"]
    step, tried = choose(monkeypatch, needs["none"])  # of which some is left free
    assert step.task.config.remat == tried[-1][0] != "none"
    assert step.memory_bytes() <= 0.95 * needs["none"]


def test_a_named_policy_that_does_not_fit_is_an_error_that_names_one_that_does(monkeypatch, needs):
    with pytest.raises(UserError) as error:
        choose(monkeypatch, needs["full"] * 1.1, "none")
    words = str(error.value)
    assert (
        "config.model.remat: none doesn't fit in 0.00 GiB a device (GiB needed: none 0.00; parameters 0.00"
        in words
    )
    assert words.endswith("GiB)")
    assert "config.objective.accumulate_steps=1 would fit" in words


@pytest.mark.slow
def test_what_fits_nowhere_is_said_to(monkeypatch):
    with pytest.raises(
        UserError, match=r"none 0\.00, dots 0\.00, attention 0\.00, full 0\.00; .*a larger config.mesh.fsdp"
    ):
        choose(monkeypatch, 1000)


def test_categories_add_up():
    step = make_step(MeshConfig(data=1, fsdp=8))
    text = format_breakdown(step)
    names = [part.rsplit(" ", 1)[0] for part in text.split(", ")]
    assert names == ["parameters", "optimizer", "batch", "temporaries"]


def test_an_unknown_accelerator_needs_a_named_policy(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda mesh: None)
    with pytest.raises(UserError, match="auto needs to know the memory of 'cpu'"):
        find_fitting_step(make, "auto", 1)
    assert find_fitting_step(make, "full", 1).task.config.remat == "full"


def test_a_cpu_has_the_memory_of_the_machine():
    one, two = (make_mesh(MeshConfig(), jax.devices()[:count]) for count in (1, 2))
    assert memory_limit(two) == pytest.approx(memory_limit(one) / 2)
    assert memory_limit(two) > 2**28


def test_a_step_that_ran_out_of_memory_gets_advice(monkeypatch):
    found = explain_out_of_memory(make, make("none", 1), "none", 1)
    assert found.startswith(
        "the step alone needs 0.00 GiB a device (parameters 0.00, optimizer 0.00, batch 0.00"
    )
    assert " would fit (0.00 GiB)" in found
    assert "config.model.remat=none with config.objective.accumulate_steps=1 " not in found
