"""The training loop, for every `Trainable`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from lvm.accelerators import of_device
from lvm.console import duration, say
from lvm.errors import EXIT_PREEMPTED, DivergedError, UserError
from lvm.training.checkpoint import Checkpoints, newest_step
from lvm.training.metrics import MetricsWriter
from lvm.training.step import Step
from lvm.training.trainable import Batch, State
from lvm.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run is, and what it does how often (in steps; 0 is never, but at the end).

    Attributes:
      total_steps: the run's length; 0 where `total_tokens` gives it.
      total_tokens: the same in tokens, rounded up to whole steps.
      keep: how many checkpoints are kept.
    """

    total_steps: int = 100_000
    total_tokens: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    picture_every: int = 5000
    checkpoint_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.total_tokens < 0 or (self.total_tokens > 0) == (self.total_steps > 0):
            raise UserError(
                f"total_steps: {self.total_steps} and total_tokens: {self.total_tokens}; one of them is positive, "
                "the other 0"
            )
        for name in ("log_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("evaluate_every", "picture_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")

    def in_steps(self, tokens_per_step: int) -> LoopConfig:
        """The same with its length in steps; `tokens_per_step` is 0 for what has no tokens."""
        if self.total_steps:
            return self
        if not tokens_per_step:
            raise UserError("config.loop.total_tokens: there are no tokens here; give total_steps")
        return dataclasses.replace(self, total_steps=-(-self.total_tokens // tokens_per_step), total_tokens=0)


def is_finished(workdir: Workdir, config: LoopConfig) -> bool:
    """Whether a workdir's newest checkpoint is that of the last step; says so if it is."""
    step = newest_step(workdir.path)
    if step is None or step < config.total_steps:
        return False
    say(f"{workdir.path}: training is complete at step {step}")
    return True


class Loop:
    """Runs a trainable from its workdir's newest checkpoint to the end.

    Args:
      step: a trainable's update on a mesh.
      read_batch: step → that step's global batch, a pure function.
      config: see `LoopConfig`.
      workdir: where checkpoints, metrics and pictures go.
      meta: goes into every checkpoint.
      tokens_per_step: for the metrics `tokens` and `tokens_per_second`; 0 leaves them out.
      flops_per_step: convention of `lvm.flops` → operations of a step; for the metrics `mfu_…`, on accelerators
        whose peak is known.
    """

    def __init__(
        self,
        step: Step,
        read_batch: Callable[[int], Batch],
        config: LoopConfig,
        workdir: Workdir,
        meta: dict[str, Any],
        tokens_per_step: int = 0,
        flops_per_step: Mapping[str, float] | None = None,
    ):
        self._step, self._trainable = step, step.trainable
        self._read_batch, self._config = read_batch, config
        self._path, self._meta = workdir.path, meta
        self._tokens_per_step = tokens_per_step
        self._seconds_at_peak = _seconds_at_peak(flops_per_step or {}, step.mesh)
        self._checkpoints = Checkpoints(self._path, config.keep)
        self._stop_requested = False

    def run(self) -> State:
        """Trains to `total_steps` and returns the state.

        Raises:
          DivergedError: the loss is not finite.
          SystemExit: SIGTERM came; the step is saved, the exit code says so.
        """
        state, start = self._start()
        total = self._config.total_steps
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        self._metrics = MetricsWriter(self._path, start)
        try:
            state = self._train(state, start, total)
        finally:
            self._metrics.close()
            self._checkpoints.close()  # waits for the save under way
            signal.signal(signal.SIGTERM, previous)
        return state

    def _start(self) -> tuple[State, int]:
        step = self._checkpoints.latest()
        if step is None:
            return self._step.init(), 0
        say(f"{self._path}: going on from step {step}")
        state, _ = self._checkpoints.restore(step, self._step.state)
        return state, step

    def _train(self, state: State, start: int, total: int) -> State:
        clock = _Clock()
        for step, batch in enumerate(clock.wait_for(self._batches(start, total)), start + 1):
            state, metrics = self._step(state, batch)
            last = step == total
            self._report(step, state, metrics, clock, last)
            if last or _due(step, self._config.picture_every):
                with clock.paused(state):
                    self._draw(step, state)
            stopping = self._stop_requested  # read once: the signal may come between any two lines
            if last or stopping or _due(step, self._config.checkpoint_every):
                self._check_finite(step, metrics)
                self._checkpoints.save(state, step, self._meta)
            if stopping:
                self._checkpoints.wait()
                say(f"SIGTERM: saved at step {step}")
                raise SystemExit(EXIT_PREEMPTED)
        return state

    def _batches(self, start: int, total: int) -> Iterator[Batch]:
        steps = grain.MapDataset.range(start, total).map(self._read_batch)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        for batch in steps.to_iter_dataset(options):
            yield self._step.place(batch)

    def _report(
        self, step: int, state: State, metrics: dict[str, jax.Array], clock: _Clock, last: bool
    ) -> None:
        values: dict[str, float] = {}
        if last or _due(step, self._config.log_every):
            values |= self._measure(step, metrics, clock)
            seconds, left = values["step_seconds"], self._config.total_steps - step
            rate = f"{1 / seconds:.3g} steps/s, {duration(left * seconds)} left"
            say(f"step {step}/{self._config.total_steps}, {rate}, loss {values['loss']:.4f}")
            self._check_finite(step, metrics)
        if last or _due(step, self._config.evaluate_every):
            with clock.paused(state):
                heldout = self._trainable.evaluate(state)
            if heldout:
                say("  " + ", ".join(f"{name} {value:.4f}" for name, value in heldout.items()))
            values |= heldout
        if values:
            self._metrics.write(step, values)

    def _measure(self, step: int, metrics: dict[str, jax.Array], clock: _Clock) -> dict[str, float]:
        # Reading the metrics waits for the step, so the clock measures steps that have ended. A source that
        # the batch held no token of has no loss (NaN there).
        values = {name: float(value) for name, value in metrics.items()}
        values = {name: x for name, x in values.items() if not (name.startswith("loss/") and math.isnan(x))}
        seconds, waited = clock.lap()
        values |= {"step_seconds": seconds, "input_wait": waited}
        if self._tokens_per_step:
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
            values["tokens"] = step * self._tokens_per_step
            values["tokens_per_second"] = self._tokens_per_step / seconds
        values |= {f"mfu_{name}": at_peak / seconds for name, at_peak in self._seconds_at_peak.items()}
        return values

    def _draw(self, step: int, state: State) -> None:
        for name, picture in self._trainable.pictures(state).items():
            folder = self._path / "pictures"
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / f"{name}-{step:07d}.png")

    def _check_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        # The loss is that of the parameters before the step; the norm is that of those after it.
        for name in ("loss", "grad_norm", "param_norm"):
            if name in metrics and not np.isfinite(float(metrics[name])):
                raise DivergedError(f"{self._path}: {name} is {float(metrics[name])} at step {step}")

    def _request_stop(self, signum: int, frame: Any) -> None:
        self._stop_requested = True


class _Clock:
    """Time a step, and the share of it spent waiting for input."""

    def __init__(self) -> None:
        self._mark, self._waited, self._steps = time.monotonic(), 0.0, 0

    def wait_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
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
        """Leaves out the time of what isn't training; the steps under way end before."""
        jax.block_until_ready(state)
        before = time.monotonic()
        yield
        self._mark += time.monotonic() - before

    def lap(self) -> tuple[float, float]:
        """Seconds a step and the share waited, since the lap before."""
        now = time.monotonic()
        elapsed = now - self._mark
        seconds, waited = elapsed / max(1, self._steps), self._waited / max(elapsed, 1e-9)
        self._mark, self._waited, self._steps = now, 0.0, 0
        return seconds, waited


def _seconds_at_peak(flops_per_step: Mapping[str, float], mesh: Mesh) -> dict[str, float]:
    """Seconds that a step would take at the devices' peak, by convention; nothing where the peak isn't known."""
    accelerator = of_device(mesh.devices.flat[0])
    if accelerator is None:
        return {}
    return {name: flops / (accelerator.peak_flops * mesh.size) for name, flops in flops_per_step.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
