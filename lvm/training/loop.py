"""The training loop, for every `TrainTask`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lvm.common import distributed, files
from lvm.common.distributed import Preemption
from lvm.common.errors import EXIT_PREEMPTED, DivergedError, UserError
from lvm.common.logging import duration, log_info
from lvm.common.png import encode_png
from lvm.data.mixture import loader
from lvm.hardware.accelerators import accelerator_of
from lvm.training.checkpoint import Checkpoints, latest_step
from lvm.training.metrics import Goodput, MetricsWriter
from lvm.training.profiling import StepProfiler
from lvm.training.spikes import SkippedBatches, SpikeConfig, SpikeDetector, SpikeError
from lvm.training.step import Step
from lvm.training.task import Batch, Metrics, State
from lvm.training.watchdog import Watchdog, WatchdogConfig
from lvm.training.workdir import Workdir

DIVERGED = "diverged.json"
ReadBatch = Callable[[int, np.ndarray], Mapping[str, np.ndarray]]  # (step, rows) → those rows of its batch
_STEPS_AHEAD = 2  # steps that may be under way while the next is prepared


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run is, and what it does how often (in steps; 0 is never, but at the end).

    Attributes:
      total_steps: the run's length; 0 where `total_tokens` gives it.
      total_tokens: the same in tokens, rounded up to whole steps.
      keep: how many of the newest checkpoints are kept.
      keep_every: checkpoints of steps that it divides are kept for good; 0 for none.
      max_skipped: so many steps in a row without a finite gradient end the run; each leaves all as it was.
      input_workers: processes that read batches ahead; 0 reads in threads.
      profile: the first and the last step of a trace into `profile/`; empty for none. A running job traces its next
        steps when a file `profile.request` appears in its workdir.
      compilation_cache: where compiled programs are kept for the next start; "" is JAX_COMPILATION_CACHE_DIR, or
        else the workdir.
      wandb: the Weights & Biases project, "project" or "entity/project", that metrics go to as well; "" for none.
    """

    total_steps: int = 100_000
    total_tokens: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    picture_every: int = 5000
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int = 0
    max_skipped: int = 10
    input_workers: int = 0
    profile: tuple[int, ...] = ()
    compilation_cache: str = ""
    wandb: str = ""
    spike: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        if self.total_tokens < 0 or (self.total_tokens > 0) == (self.total_steps > 0):
            raise UserError(
                f"total_steps: {self.total_steps} and total_tokens: {self.total_tokens}; one of them is positive, "
                "the other 0"
            )
        for name in ("log_every", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("evaluate_every", "picture_every", "checkpoint_every", "keep_every", "input_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise UserError(f"profile: {self.profile}; wanted the first and the last step, or nothing")

    def with_total_steps(self, tokens_per_step: int) -> LoopConfig:
        """The same with its length in steps; `tokens_per_step` is 0 for what has no tokens."""
        if self.total_steps:
            return self
        if not tokens_per_step:
            raise UserError("config.loop.total_tokens: there are no tokens here; give total_steps")
        return dataclasses.replace(self, total_steps=-(-self.total_tokens // tokens_per_step), total_tokens=0)


def is_finished(workdir: Workdir, config: LoopConfig) -> bool:
    """Whether a workdir's newest checkpoint is that of the last step; says so if it is."""
    step = latest_step(workdir.path)
    if step is None or step < config.total_steps:
        return False
    log_info(f"{workdir.path}: training is complete at step {step}")
    return True


class Loop:
    """Runs a task from its workdir's newest sound checkpoint to the end.

    Args:
      step: a task's update on a mesh.
      read_batch: (step, rows) → those rows of that step's global batch, a pure function.
      config: see `LoopConfig`.
      workdir: where checkpoints, metrics and pictures go.
      tokens_per_step: for the metrics `tokens` and `tokens_per_second`; 0 leaves them out.
      flops_per_step: convention of `lvm.model.flops` → operations of a step; for the metrics `mfu_…`, on accelerators
        whose peak is known.
      memory_advice: what to say where a step runs out of memory; nothing by default.
    """

    def __init__(
        self,
        step: Step,
        read_batch: ReadBatch,
        config: LoopConfig,
        workdir: Workdir,
        tokens_per_step: int = 0,
        flops_per_step: Mapping[str, float] | None = None,
        memory_advice: Callable[[], str] = lambda: "",
    ):
        self._step, self._trainable = step, step.task
        self._read_batch, self._config = read_batch, config
        self._path = workdir.path
        self._tokens_per_step = tokens_per_step
        self._memory_advice = memory_advice
        self._seconds_at_peak = _seconds_at_peak(flops_per_step or {}, step.mesh)
        self._checkpoints = Checkpoints(self._path, config.keep, config.keep_every)
        self._preemption, self._watchdog = Preemption(), Watchdog(config.watchdog)
        self._profiler = StepProfiler(self._path, config.profile)
        self._goodput, self._detector = Goodput(), SpikeDetector(config.spike)
        self._skipped_batches = SkippedBatches.load(self._path)

    def run(self) -> State:
        """Trains to `total_steps` and returns the state.

        Raises:
          DivergedError: too many steps in a row had no finite gradient, or too many losses were spikes.
          UserError: a device ran out of memory.
          SystemExit: SIGTERM came; the step is saved, the exit code says so.
        """
        with self._preemption, self._watchdog, self._memory_explained():
            state, start = self._start()
            try:
                while True:
                    with MetricsWriter(self._path, start, self._config.wandb) as self._metrics:
                        try:
                            return self._train(state, start, self._config.total_steps)
                        except SpikeError as error:
                            # Its frames hold the state, of which the memory is needed for the one to go back to.
                            spike = error.with_traceback(None)
                        state, start = self._rewind(spike)
            finally:
                self._profiler.stop()
                with self._watchdog.pause("the last checkpoint"):
                    self._checkpoints.close()  # waits for the save under way

    @contextlib.contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"out of memory: {reason}; {self._memory_advice()}".rstrip("; ")) from error

    def _start(self) -> tuple[State, int]:
        step = self._checkpoints.latest_intact_step()
        if step is None:
            self._goodput = self._goodput.reset()
            self._detector = SpikeDetector(self._config.spike)
            return self._step.init(), 0
        log_info(f"{self._path}: going on from step {step}")
        state, meta = self._checkpoints.restore(step, self._step.state)
        self._goodput = Goodput.from_meta(meta)
        self._detector = SpikeDetector(self._config.spike, meta.get("losses", ()))
        return state, step

    def _rewind(self, spike: SpikeError) -> tuple[State, int]:
        """Back to before a spike, and around its batches. All processes see the same losses, so all come here."""
        limits = self._config.spike
        batch = self._skipped_batches.batch_index(spike.step - 1)
        if self._skipped_batches.rewinds == limits.max_rewinds:
            self._write_diverged([batch])
            raise DivergedError(
                f"{self._path}: {spike}, and {limits.max_rewinds} were gone around already; its batch is in {DIVERGED}"
            )
        with self._watchdog.pause("going back before a spike"):
            self._checkpoints.wait()
            kept = self._checkpoints.all_steps()
            early_enough = [step for step in kept if step < spike.step - limits.skip_before]
            target = max(early_enough, default=min(kept, default=0))
            # First the checkpoints, then the list: a kill in between meets the same spike again.
            self._checkpoints.delete_after(target)
            first = self._skipped_batches.batch_index(max(target, spike.step - 1 - limits.skip_before))
            self._skipped_batches.add(first, batch)
            if distributed.is_first():
                self._skipped_batches.save(self._path)
            log_info(
                f"{spike}; batches {first} to {batch} are left out, rewind {self._skipped_batches.rewinds}"
            )
            return self._start()

    def _train(self, state: State, start: int, total: int) -> State:
        clock = _Clock()
        reports: deque[tuple[int, Metrics]] = deque()  # of steps that may still be running
        for step, batch in enumerate(clock.wait_for(self._batches(start, total)), start + 1):
            self._profiler.start_step(step)
            state, metrics = self._step(state, batch)
            reports.append((step, metrics))
            last = step == total
            self._look_back(reports, 0 if last else _STEPS_AHEAD)
            self._report(step, state, metrics, clock, last)
            if last or _due(step, self._config.picture_every):
                with clock.paused(state), self._watchdog.pause("drawing pictures"):
                    self._draw(step, state)
            stopping = self._preemption.noticed()
            if last or stopping or _due(step, self._config.checkpoint_every):
                self._look_back(reports, 0)
                with clock.paused(state):
                    self._save(state, step)
            if stopping:
                began = time.monotonic()
                with self._watchdog.pause("the last checkpoint"):
                    self._checkpoints.wait()
                log_info(f"SIGTERM: saved at step {step}, which took {time.monotonic() - began:.1f} s more")
                raise SystemExit(EXIT_PREEMPTED)
        return state

    def _batches(self, start: int, total: int) -> Iterator[Batch]:
        read = functools.partial(_read_own, self._read_batch, self._step.rows, self._skipped_batches)
        for batch in loader.prefetch_batches(read, start, total, self._config.input_workers):
            yield self._step.shard_batch(batch)

    def _save(self, state: State, step: int) -> None:
        with self._watchdog.pause("saving a checkpoint"):
            meta = {**self._goodput.to_json(), "losses": self._detector.recent_losses}
            self._checkpoints.save(state, step, meta)

    def _look_back(self, reports: deque[tuple[int, Metrics]], ahead: int) -> None:
        """Waits for all but the `ahead` newest steps; ends the run where too many were skipped in a row.

        Raises SpikeError where a loss is one.
        """
        while len(reports) > ahead:
            step, metrics = reports.popleft()
            in_row = int(metrics["skipped_in_row"])
            self._watchdog.step_ended()
            if in_row:
                log_info(f"step {step}: the gradient is not finite; skipped, {in_row} in a row")
            if in_row >= self._config.max_skipped:
                self._write_diverged(
                    [self._skipped_batches.batch_index(n) for n in range(step - in_row, step)]
                )
                raise DivergedError(
                    f"{self._path}: no finite gradient in {in_row} steps, the last was {step}; "
                    f"loss {float(metrics['loss'])}; their batches are in {DIVERGED}"
                )
            if not in_row:
                self._detector.update(step, float(metrics["loss"]))

    def _write_diverged(self, numbers: Sequence[int]) -> None:
        """Says which batches these were: their numbers, and the hash of the rows that this process read."""
        if distributed.is_first():
            batches = {str(number): _hash(self._read_batch(number, self._step.rows)) for number in numbers}
            files.write_json(self._path / DIVERGED, {"batches": batches})

    def _report(self, step: int, state: State, metrics: Metrics, clock: _Clock, last: bool) -> None:
        values: dict[str, float] = {}
        if last or _due(step, self._config.log_every):
            values |= self._measure(step, metrics, clock)
            seconds, left = values["step_seconds"], self._config.total_steps - step
            rate = f"{1 / seconds:.3g} steps/s, {duration(left * seconds)} left"
            log_info(f"step {step}/{self._config.total_steps}, {rate}, loss {values['loss']:.4f}")
        if last or _due(step, self._config.evaluate_every):
            with clock.paused(state), self._watchdog.pause("an evaluation"):
                heldout = self._trainable.evaluate(state, self._preemption.noticed)
            if heldout:
                log_info("  " + ", ".join(f"{name} {value:.4f}" for name, value in heldout.items()))
            values |= heldout
        if values:
            self._metrics.write(step, values)

    def _measure(self, step: int, metrics: dict[str, jax.Array], clock: _Clock) -> dict[str, float]:
        # Reading the metrics waits for the step, so the clock measures steps that have ended. A source that
        # the batch held no token of has no loss (NaN there).
        values = {name: float(value) for name, value in metrics.items()}
        values = {name: x for name, x in values.items() if not (name.startswith("loss/") and math.isnan(x))}
        seconds, waited, steps = clock.lap()
        values |= {
            "step_seconds": seconds,
            "input_wait_fraction": waited,
            "goodput": self._goodput.add(steps * seconds),
        }
        if self._tokens_per_step:
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
            values["tokens"] = step * self._tokens_per_step
            values["tokens_per_second"] = self._tokens_per_step / seconds
        memory = [(device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()]
        if any(memory):
            values["memory_bytes"] = max(memory)
        values |= {f"mfu_{name}": at_peak / seconds for name, at_peak in self._seconds_at_peak.items()}
        return values

    def _draw(self, step: int, state: State) -> None:
        pictures = self._trainable.pictures(state)  # all processes draw, one writes
        for name, picture in pictures.items() if distributed.is_first() else ():
            folder = self._path / "pictures"
            folder.mkdir(exist_ok=True)
            files.write_atomically(folder / f"{name}-{step:07d}.png", encode_png(picture))


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

    def lap(self) -> tuple[float, float, int]:
        """Seconds a step, the share waited, and the steps, since the lap before."""
        now = time.monotonic()
        elapsed, steps = now - self._mark, self._steps
        seconds, waited = elapsed / max(1, steps), self._waited / max(elapsed, 1e-9)
        self._mark, self._waited, self._steps = now, 0.0, 0
        return seconds, waited, steps


def _seconds_at_peak(flops_per_step: Mapping[str, float], mesh: Mesh) -> dict[str, float]:
    """Seconds that a step would take at the devices' peak, by convention; nothing where the peak isn't known."""
    accelerator = accelerator_of(mesh.devices.flat[0])
    if accelerator is None:
        return {}
    return {name: flops / (accelerator.peak_flops * mesh.size) for name, flops in flops_per_step.items()}


def _read_own(
    read: ReadBatch, rows: np.ndarray, skipped: SkippedBatches, step: int
) -> Mapping[str, np.ndarray]:
    return read(
        skipped.batch_index(step), rows
    )  # not a method of the loop: it may be sent to another process


def _hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
