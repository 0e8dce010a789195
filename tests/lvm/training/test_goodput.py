"""Goodput: all wall time of a run has one cause, over restarts and rollbacks."""

import types

import pytest

from lvm.training import goodput
from lvm.training.goodput import Goodput


class Machine:
    """A clock that runs on over processes, whose monotonic clocks begin anew."""

    def __init__(self, monkeypatch):
        self.now, self._booted = 1e9, 1e9
        clock = types.SimpleNamespace(monotonic=lambda: self.now - self._booted, time=lambda: self.now)
        monkeypatch.setattr(goodput, "time", clock)
        monkeypatch.setattr(goodput, "_process_start", lambda: self.now - self._booted)

    def start(self, after=0.0):
        """A new process, on another host, so many seconds later."""
        self.now += after
        self._booted = self.now - 7
        return Goodput()

    def spend(self, times, cause, seconds):
        with times.spent_on(cause):
            self.now += seconds


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def seconds(times):
    return {cause: value for cause, value in times.seconds.items() if value}


def test_goodput_time_has_one_cause_at_a_time(machine):
    times = machine.start()
    machine.now += 5
    with times.spent_on(goodput.EVALUATION):
        machine.now += 10
        machine.spend(times, goodput.SAVE, 2)
        machine.now += 1
    times.switch(goodput.STEPS)
    machine.now += 100
    times.move(goodput.INPUT, 30)
    values = times.metrics()
    assert seconds(times) == {"start": 5, "evaluation": 11, "save": 2, "steps": 70, "input": 30}
    assert values["goodput"] == pytest.approx(70 / 118)
    assert values["badput/evaluation"] == 11
    assert "badput/down" not in values


def test_goodput_of_a_restart_adds_down_time_and_lost_steps(machine):
    first = machine.start()
    machine.spend(first, goodput.STEPS, 200)
    saved = first.seconds[goodput.STEPS]
    machine.spend(first, goodput.STEPS, 50)
    record = first.record()
    machine.now += 7  # until it dies, unrecorded
    second = machine.start(after=60)
    machine.now += 20
    second.continue_from(record)
    second.roll_back(saved)
    second.switch(goodput.STEPS)
    machine.now += 100
    second.metrics()
    assert seconds(second) == {"steps": 300, "lost_steps": 50, "start": 20, "down": 67}
    assert second.started == first.started
    assert sum(second.seconds.values()) == machine.now - first.started
    assert second.table() == [
        "steps           5m00s   68.6%", "down            1m07s   15.3%", "lost_steps        50s   11.4%",
        "start             20s    4.6%",
    ]  # fmt: skip


def test_goodput_without_a_checkpoint_loses_all_steps(machine):
    first = machine.start()
    machine.spend(first, goodput.STEPS, 30)
    record = first.record()
    second = machine.start()
    second.continue_from(record)
    second.roll_back(0.0)
    assert seconds(second) == {"lost_steps": 30}


@pytest.mark.parametrize("content", [None, b"\0" * 8, b"{}", b'{"started": 1.0}'])
def test_goodput_without_a_record_begins_anew(tmp_path, content):
    if content is not None:
        (tmp_path / goodput.FILENAME).write_bytes(content)
    assert goodput.read_record(tmp_path) == {}


def test_process_start_is_before_now():
    assert 0 < goodput.time.monotonic() - goodput._process_start() < 86400
