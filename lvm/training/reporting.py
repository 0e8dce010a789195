"""Measurements of a run: times of steps, rates, memory, goodput."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from lvm.hardware.accelerators import accelerator_of
from lvm.training.metrics import Goodput
from lvm.training.task import Batch, Metrics, State


class Reporter:
    """Turns the outputs and times of steps into metrics.

    Args:
      mesh: the devices of the run.
      tokens_per_step: for the metrics `tokens` and `tokens_per_second`; 0 omits them.
      flops_per_step: FLOPs of a step by convention, for the metrics `mfu_…`.

    Attributes:
      goodput: of the run, restarts included.
    """

    def __init__(self, mesh: Mesh, tokens_per_step: int, flops_per_step: Mapping[str, float]):
        self.goodput, self._tokens_per_step = Goodput(), tokens_per_step
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
        seconds, waited, steps = clock.lap()
        goodput = self.goodput.add(steps * seconds)
        values |= {"step_seconds": seconds, "input_wait_fraction": waited, "goodput": goodput}
        if self._tokens_per_step:
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
            values["tokens"] = step * self._tokens_per_step
            values["tokens_per_second"] = self._tokens_per_step / seconds
        memory = [(device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()]
        if any(memory):
            values["memory_bytes"] = max(memory)
        return values | {f"mfu_{name}": at_peak / seconds for name, at_peak in self._seconds_at_peak.items()}


class Clock:
    """Measures the time of a step, and the fraction of it spent waiting for input."""

    def __init__(self) -> None:
        self._started_at, self._waited, self._steps = time.monotonic(), 0.0, 0

    def time_input(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            self._steps += 1
            yield batch

    @contextlib.contextmanager
    def paused(self, state: State) -> Iterator[None]:
        """Waits for the running steps, then excludes the time of the context."""
        jax.block_until_ready(state)
        before = time.monotonic()
        yield
        self._started_at += time.monotonic() - before

    def elapsed(self) -> float:
        """Seconds since the previous lap, without pauses."""
        return time.monotonic() - self._started_at

    def lap(self) -> tuple[float, float, int]:
        """Seconds per step, fraction waited, and number of steps, since the previous lap."""
        now = time.monotonic()
        elapsed, steps = now - self._started_at, self._steps
        seconds, waited = elapsed / max(1, steps), self._waited / max(elapsed, 1e-9)
        self._started_at, self._waited, self._steps = now, 0.0, 0
        return seconds, waited, steps
