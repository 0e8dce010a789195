"""Times of the loop on a known clock: step times, rates, goodput."""

import threading
import time
import types

import numpy as np

from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import goodput, metrics, reporting
from lvm.training.checkpoint import Checkpoints
from lvm.training.loop import Loop, LoopConfig
from lvm.training.step import Step
from lvm.training.workdir import Workdir
from tests.lvm.training.test_loop import Regression, read_batch


class KnownTimes(Step):
    """A step whose devices are still at work when it returns; every activity of the loop takes a known time."""

    def __init__(self, task, mesh, monkeypatch):
        super().__init__(task, mesh, seed=0)
        self.now, self.is_running, self.saved = 0.0, False, []
        stats = [{"bytes_in_use": 3}, None, {"bytes_in_use": 5}]
        devices = [types.SimpleNamespace(memory_stats=lambda value=value: value) for value in stats]
        fake_jax = types.SimpleNamespace(block_until_ready=self._finish, local_devices=lambda: devices)
        clock = types.SimpleNamespace(monotonic=lambda: self.now, time=lambda: 1e9 + self.now)
        monkeypatch.setattr(reporting, "jax", fake_jax)
        monkeypatch.setattr(reporting, "time", clock)
        monkeypatch.setattr(goodput, "time", clock)
        monkeypatch.setattr(goodput, "_process_start", lambda: 0.0)
        monkeypatch.setattr(reporting, "IdleTimer", lambda: KnownIdle(self))
        monkeypatch.setattr(reporting, "accelerator_of", lambda device: types.SimpleNamespace(peak_flops=1000.0))
        self._lasting(monkeypatch, task, "evaluate", 100.0)
        self._lasting(monkeypatch, task, "pictures", 50.0)
        self._lasting(monkeypatch, Checkpoints, "save", 30.0)

    def _lasting(self, monkeypatch, owner, name, seconds):
        original = getattr(owner, name)

        def lasting(*arguments):
            self.now += seconds
            if name == "save":
                self.saved.append(arguments[-1])
            return original(*arguments)

        monkeypatch.setattr(owner, name, lasting)

    def _finish(self, state):
        self.now += 3.0 * self.is_running
        self.is_running = False

    def compile(self, index=None):
        self.now += 40.0 * (not self._compiled)
        return super().compile(index)

    def shard_batch(self, batch):
        self.now += 0.5
        return super().shard_batch(batch)

    def init(self):
        self.now += 7.0
        return super().init()

    def __call__(self, state, batch, index=None):
        self.now, self.is_running = self.now + 2.0, True
        return super().__call__(state, batch, index)


class KnownIdle(reporting.IdleTimer):
    """Devices that are at work for 2 s of every step, which takes 2.5 s: they idle while its batch is read."""

    def __init__(self, step):
        super().__init__()
        self._step, self._ended_at = step, 0.0

    def dispatched(self, at, output):
        self._idle += at - self._ended_at
        self._ended_at = at + 2.0


def test_times_and_rates_are_of_steps_alone(tmp_path, monkeypatch):
    step = KnownTimes(Regression(), make_mesh(MeshConfig(data=4, fsdp=2)), monkeypatch)
    config = LoopConfig(total_steps=7, log_every=3, evaluate_every=4, picture_every=4, checkpoint_every=4)
    read_rows = lambda index, rows: {name: x[rows] for name, x in read_batch(index).items()}  # noqa: E731
    Loop(step, read_rows, config, Workdir(tmp_path, "lvm", {"config": {}}), 80, {"palm": 10_000.0}).run()
    first, second, last = (line for line in metrics.read_metrics(tmp_path) if "loss" in line)
    # A step takes 2.5 s, 0.5 of them for its batch. The evaluation after step 4 waits 3 s for the devices.
    seconds = np.array([2.5, (3 * 2.5 + 3) / 3, 2.5])
    lines = [first, second, last]
    np.testing.assert_allclose([line["step_seconds"] for line in lines], seconds)
    np.testing.assert_allclose([line["input_wait_fraction"] for line in lines], 0.5 / seconds)
    np.testing.assert_allclose([line["tokens_per_second"] for line in lines], 80 / seconds)
    np.testing.assert_allclose([line["mfu_palm"] for line in lines], 10_000 / (8 * 1000) / seconds)
    assert [line["memory_bytes"] for line in lines] == [5, 5, 5]
    # Devices are at work for 2 s of a step. They idle while a batch is read, and for 3 s before the evaluation.
    idle = np.array([1.5, 6.0, 6.5])
    productive = np.array([7.5, 18.0, 20.5]) - idle
    paused = 7.0 + np.array([40.0, 220.0, 220.0])  # initialized, compiled, evaluated, rendered and saved
    np.testing.assert_allclose([line["goodput"] for line in lines], productive / (productive + idle + paused))
    badput = {name.removeprefix("badput/"): value for name, value in last.items() if name.startswith("badput/")}
    assert badput == {
        "start": 7.0, "compile": 40.0, "evaluation": 100.0, "pictures": 50.0, "save": 30.0, "input": 3.5, "host": 3.0,
    }  # fmt: skip
    # Steps since the last line count for the checkpoint of step 4.
    np.testing.assert_allclose([meta["productive_seconds"] for meta in step.saved], [7.5 - 1.5 + 2.5 + 3, 14.0 + 3])


def test_idle_time_is_from_end_to_dispatch(monkeypatch):
    now, ended = [0.0], threading.Event()
    monkeypatch.setattr(reporting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    timer = reporting.IdleTimer()
    output = types.SimpleNamespace(block_until_ready=ended.wait)
    for dispatched_at in (3.0, 4.0):  # the second while the first is at work
        timer.dispatched(dispatched_at, output)
    now[0] = 10.0
    ended.set()
    assert timer.take() == 3.0
    now[0] = 15.0
    with timer.paused():
        now[0] = 100.0
    timer.dispatched(101.0, output)
    assert timer.take() == 5.0 + 1.0
    timer.close()


def test_idle_timer_outlives_a_failed_step():
    def fail():
        raise RuntimeError("step failed")

    timer = reporting.IdleTimer()
    timer.dispatched(time.monotonic(), types.SimpleNamespace(block_until_ready=fail))
    timer.take()
    timer.dispatched(time.monotonic(), types.SimpleNamespace(block_until_ready=lambda: None))
    assert timer.take() < 60
    timer.close()
