"""Measurements of a run: times of steps, rates, memory, idle devices, goodput."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lvm.hardware.accelerators import accelerator_of
from lvm.training import goodput
from lvm.training.goodput import Goodput
from lvm.training.hosts import HostFigures, Hosts
from lvm.training.step import Step
from lvm.training.task import Batch, Metrics, State


class Reporter:
    """Turns the outputs and times of steps into metrics. All processes must create it and call `measure` alike.

    Args:
      mesh: the devices of the run.
      tokens_per_step: for the metrics `tokens` and `tokens_per_second`; 0 omits them.
      flops_per_step: FLOPs of a step by convention, for the metrics `mfu_…`.
      times: of the run.

    Attributes:
      skipped: sentences that this process left out as damaged.
    """

    def __init__(self, mesh: Mesh, tokens_per_step: int, flops_per_step: Mapping[str, float], times: Goodput):
        self._tokens_per_step, self._times, self.skipped = tokens_per_step, times, 0
        self._hosts = Hosts()
        accelerator = accelerator_of(mesh.devices.flat[0])
        self._seconds_at_peak: dict[str, float] = {}  # of a step, by convention
        if accelerator is not None:
            peak_flops = accelerator.peak_flops * mesh.size
            self._seconds_at_peak = {name: flops / peak_flops for name, flops in flops_per_step.items()}

    def measure(self, step: int, metrics: Metrics, clock: Clock) -> dict[str, float]:
        """Metrics of a step and of the times since the previous call; waits for the step."""
        # Reading the metrics waits for the step, so the clock measures completed steps.
        # The loss of a component without tokens in the batch is NaN.
        values = {name: float(x) for name, x in metrics.items() if not (name.startswith("loss/") and math.isnan(x))}
        lap = clock.lap()
        seconds = lap.elapsed / lap.steps
        figures = self._hosts.gather(lap.input_wait / lap.steps, lap.idle / lap.steps, self.skipped)
        self._count_idle(figures, lap.steps)
        values |= {"step_seconds": seconds, "input_wait_fraction": lap.input_wait / max(lap.elapsed, 1e-9)}
        values |= self._hosts.metrics(figures, seconds) | self._times.metrics()
        if self._tokens_per_step:
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
            values["tokens"] = step * self._tokens_per_step
            values["tokens_per_second"] = self._tokens_per_step / seconds
        memory = [(device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()]
        if any(memory):
            values["memory_bytes"] = max(memory)
        return values | {f"mfu_{name}": at_peak / seconds for name, at_peak in self._seconds_at_peak.items()}

    def _count_idle(self, figures: HostFigures, steps: int) -> None:
        """Counts the time that devices were idle as badput: all wait for the process whose devices idled longest."""
        typical = statistics.median_low(figures.idle.tolist()) * steps
        waited = min(typical, statistics.median_low(figures.input_wait.tolist()) * steps)
        self._times.move(goodput.STRAGGLER, float(figures.idle.max()) * steps - typical)
        self._times.move(goodput.INPUT, waited)
        self._times.move(goodput.HOST, typical - waited)


@dataclasses.dataclass(frozen=True)
class Lap:
    """Times of some steps, without pauses.

    Attributes:
      steps: how many.
      elapsed: seconds of all of them.
      input_wait: seconds that this process waited for their batches.
      idle: seconds that this process's devices had nothing to do.
    """

    steps: int
    elapsed: float
    input_wait: float
    idle: float


class Clock:
    """Times steps, and pauses between them, which count for a cause of badput."""

    def __init__(self, times: Goodput):
        self._times, self._devices = times, IdleTimer()
        self._started_at, self._waited, self._steps = time.monotonic(), 0.0, 0

    def restart(self) -> None:
        """Starts the first lap, of the first or of repeated steps."""
        with self._devices.paused():
            self.lap()

    def time_input(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and counts the time spent waiting for them."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            self._steps += 1
            yield batch

    def run(self, step: Step, state: State, batch: Batch, index: int) -> tuple[State, Metrics]:
        """Dispatches the step from `index` on."""
        dispatched_at = time.monotonic()
        state, metrics = step(state, batch, index)
        self._devices.dispatched(dispatched_at, metrics["loss"])
        return state, metrics

    @contextlib.contextmanager
    def paused(self, state: State, cause: str) -> Iterator[None]:
        """Waits for the running steps, then counts the time of the context for a cause of badput alone."""
        jax.block_until_ready(state)
        before = time.monotonic()
        with self._devices.paused(), self._times.spent_on(cause):
            yield
        self._started_at += time.monotonic() - before

    def lap(self) -> Lap:
        """The times since the previous lap; all steps must have ended."""
        now = time.monotonic()
        lap = Lap(max(1, self._steps), now - self._started_at, self._waited, self._devices.take())
        self._started_at, self._waited, self._steps = now, 0.0, 0
        return lap

    def close(self) -> None:
        """Ends the thread."""
        self._devices.close()


class IdleTimer:
    """Measures how long devices have nothing to do, from the end of a step to the dispatch of the next.

    A thread waits for the end of each step: the loop itself, which dispatches ahead, doesn't see it.
    """

    def __init__(self) -> None:
        self._dispatched: queue.Queue[tuple[float, Any] | None] = queue.Queue()
        self._idle, self._ended_at = 0.0, time.monotonic()
        threading.Thread(target=self._watch, name="idle timer", daemon=True).start()

    def dispatched(self, at: float, output: Any) -> None:
        """Takes the time of a step's dispatch and one of its outputs."""
        self._dispatched.put((at, output))

    def take(self) -> float:
        """Idle seconds since the previous call; waits for all steps."""
        self._dispatched.join()
        idle, self._idle = self._idle, 0.0
        return idle

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps; the time of the context is not idle."""
        self._dispatched.join()
        self._idle += max(0.0, time.monotonic() - self._ended_at)
        yield
        self._ended_at = time.monotonic()

    def close(self) -> None:
        """Ends the thread."""
        self._dispatched.put(None)

    def _watch(self) -> None:
        while (item := self._dispatched.get()) is not None:
            dispatched_at, output = item
            self._idle += max(0.0, dispatched_at - self._ended_at)
            with contextlib.suppress(Exception):  # the loop reads this output, too, and raises it
                output.block_until_ready()
            self._ended_at = time.monotonic()
            del item, output
            self._dispatched.task_done()
