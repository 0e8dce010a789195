"""Per-host figures: stragglers are named once, skips are summed, one all-gather a lap."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common import distributed
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import goodput, hosts
from lvm.training.goodput import Goodput
from lvm.training.hosts import HostFigures, Hosts, StragglerDetector
from lvm.training.reporting import Clock, Reporter

FAST = (0.1, 0.0, 0.003, 0)  # input wait, idle, probe, skipped


@pytest.fixture
def gathers(monkeypatch):
    """Makes this process the first of four; the list holds the other three's figures, and then all gathered values."""
    others, gathered = [FAST] * 3, []

    def gather(values):
        gathered.append(values)
        if values.dtype == np.uint8:
            rows = [f"host-{i}".encode().ljust(len(values), b"\0") for i in range(4)]
            return np.array([np.frombuffer(row, np.uint8) for row in rows])
        return np.array([values, *others], np.float32)

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(hosts.DeviceProbe, "seconds", lambda self: 0.003)
    return others, gathered


def figures(*rows):
    return HostFigures(*np.array(rows, np.float32).T)


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        (FAST, 1.0),
        ((1.0, 1.0, 0.003, 0), 2.0),  # devices idle for half of a step of 2 s, waiting for input
        ((0.0, 0.5, 0.003, 0), 4 / 3),
        ((0.1, 0.0, 0.006, 0), 2.0),  # slow devices: all wait in the collective, and none is idle
        ((1.9, 0.0, 0.003, 0), 1.0),  # waits for input while its devices are at work
    ],
)
def test_slowness_is_of_idle_or_slow_devices(slow, expected):
    np.testing.assert_allclose(figures(FAST, slow, FAST, FAST).slowness(2.0)[1], expected, rtol=1e-5)


def test_slowness_of_equally_late_hosts_is_one():
    late = (1.0, 1.0, 0.003, 0)
    np.testing.assert_allclose(figures(late, late, late).slowness(2.0), 1.0)


def test_straggler_is_named_once_until_it_changes():
    detector = StragglerDetector()
    laps = [(1.5, 1, 1), (1, 1.5, 1), (1, 1.5, 1), (1, 1.5, 1), (1, 1.6, 1), (1, 1, 1), (1, 1.5, 1)]
    laps += [(1, 1, 1)] * 3 + [(1, 1, 1.19)] * 5 + [(1, 1, 3)] * 4
    changes = [detector.update(np.array(lap, np.float32)) for lap in laps]
    assert [(lap, change) for lap, change in enumerate(changes) if change is not None] == [(3, 1), (9, -1), (17, 2)]


def test_hosts_name_a_straggler_with_its_host(gathers, caplog):
    others, _ = gathers
    others[1] = (0.9, 1.0, 0.003, 0)
    group = Hosts()
    for _ in range(5):
        values = group.metrics(group.gather(0.1, 0.0, 0), step_seconds=2.0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "process 2 (host-2) takes 2.0 ×" in line
    assert values["hosts/slowest"] == 2
    assert values["hosts/slowness_max"] == pytest.approx(2.0)
    assert values["hosts/input_wait_max"] == pytest.approx(0.9)
    assert values["hosts/idle_max"] == pytest.approx(1.0)


def test_hosts_sum_the_skips_of_all(gathers, caplog):
    others, _ = gathers
    group = Hosts()
    assert "skipped_sentences" not in group.metrics(group.gather(0.1, 0.0, 0), 2.0)
    others[2] = (*FAST[:3], 5)
    for own in (0, 0, 2):
        values = group.metrics(group.gather(0.1, 0.0, own), 2.0)
    lines = [record.getMessage() for record in caplog.records]
    assert values["skipped_sentences"] == 7
    assert ["5 sentences" in lines[0], "7 sentences" in lines[1], len(lines)] == [True, True, 2]
    assert "by 2 of 4 processes; most, 5, by process 3 (host-3)" in lines[1]


def test_reports_cost_one_gather_a_lap(gathers):
    others, gathered = gathers
    others[0] = (0.5, 2.0, 0.003, 0)
    times = Goodput()
    times.seconds[goodput.STEPS] = 100.0
    reporter, clock = Reporter(make_mesh(MeshConfig(data=-1)), 0, {}, times), Clock(times)
    before = len(gathered)
    for lap in range(10):
        for _ in range(20):
            next(clock.time_input(iter([{}])))
        reporter.measure(20 * lap, {"loss": jnp.float32(1)}, clock)
    clock.close()
    assert before == 1  # host names
    assert [values.shape for values in gathered[before:]] == [(4,)] * 10
    assert times.seconds[goodput.STRAGGLER] == pytest.approx(10 * 20 * 2.0)


def test_single_process_gathers_no_host_metrics():
    group = Hosts()
    assert group.metrics(group.gather(0.1, 0.1, 0), 2.0) == {}
    assert group.metrics(group.gather(0.1, 0.1, 3), 2.0) == {"skipped_sentences": 3.0}
