"""The training loop, shared by all tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int

from lvm.common import distributed, files
from lvm.common.distributed import Preemption
from lvm.common.errors import EXIT_PREEMPTED, DivergedError, UserError
from lvm.common.logging import format_progress, log_info
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.mixture import loader
from lvm.data.mixture.rows import SKIPPED
from lvm.training import goodput
from lvm.training.checkpoint import Checkpoints, latest_step, restore_state
from lvm.training.evaluator import Evaluation
from lvm.training.goodput import Goodput
from lvm.training.local_checkpoint import LocalCheckpointConfig, LocalCheckpoints
from lvm.training.metrics import MetricsWriter
from lvm.training.profiling import StepProfiler
from lvm.training.reporting import Clock, Reporter
from lvm.training.spikes import SkippedBatches, SpikeConfig, SpikeDetector, SpikeError
from lvm.training.step import Step
from lvm.training.task import Batch, Metrics, State
from lvm.training.watchdog import Watchdog, WatchdogConfig
from lvm.training.workdir import Workdir

DIVERGED = "diverged.json"
ReadBatch = Callable[[int, Int[np.ndarray, " n"]], Mapping[str, np.ndarray]]
_STEPS_AHEAD = 2  # dispatched before the oldest is waited for


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of a run, and intervals in steps; with an interval of 0 only the last step counts.

    Attributes:
      total_steps: length of the run; 0 if `total_tokens` is set.
      total_tokens: length of the run in tokens, rounded up to whole steps.
      keep: how many of the latest checkpoints are kept.
      keep_every: checkpoints of steps divisible by it are kept forever; 0 for none.
      keep_steps: steps whose checkpoints are saved and kept forever, such as those that other runs branch off.
      max_skipped: consecutive steps without a finite gradient that end the run; such steps change nothing.
      input_workers: processes that prefetch batches; 0 prefetches in threads.
      profile: first and last step of a trace into `profile/`; empty for none. A running job traces its next steps when
        a file `profile.request` appears in its workdir.
      compilation_cache: folder of the compilation cache; "" for JAX_COMPILATION_CACHE_DIR, or else the workdir's.
      wandb: Weights & Biases project that also gets the metrics, "project" or "entity/project"; "" for none.
      local_checkpoint: checkpoints on the hosts' own disks, between those in the workdir.
      spike: loss-spike recovery.
      watchdog: deadlines after which the run counts as stalled.
    """

    total_steps: int = 100_000
    total_tokens: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    picture_every: int = 5000
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int = 0
    keep_steps: tuple[int, ...] = ()
    max_skipped: int = 10
    input_workers: int = 0
    profile: tuple[int, ...] = ()
    compilation_cache: str = ""
    wandb: str = ""
    local_checkpoint: LocalCheckpointConfig = dataclasses.field(default_factory=LocalCheckpointConfig)
    spike: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        check_non_negative(self, "total_steps", "total_tokens")
        if (self.total_tokens > 0) == (self.total_steps > 0):
            raise UserError(
                f"total_steps={self.total_steps} and total_tokens={self.total_tokens}; set one of them, and the other "
                "to 0"
            )
        check_positive(self, "log_every", "keep", "max_skipped")
        check_non_negative(self, "evaluate_every", "picture_every", "checkpoint_every", "keep_every", "input_workers")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise UserError(f"profile={self.profile} must be empty, or the first and the last step")

    def with_total_steps(self, tokens_per_step: int) -> LoopConfig:
        """Converts the length to steps; `tokens_per_step` is 0 for a task without tokens."""
        if self.total_steps:
            return self
        if not tokens_per_step:
            raise UserError(
                f"config.loop.total_tokens={self.total_tokens}, but the task has no tokens; use total_steps"
            )
        return dataclasses.replace(self, total_steps=-(-self.total_tokens // tokens_per_step), total_tokens=0)


def is_finished(workdir: Workdir, config: LoopConfig) -> bool:
    """Checks, and logs, whether a workdir's latest checkpoint is that of the last step."""
    step = latest_step(workdir.path)
    if step is None or step < config.total_steps:
        return False
    log_info(f"{workdir.path}: training is complete at step {step}")
    return True


class Loop:
    """Runs a task from its workdir's latest intact checkpoint to the end.

    Args:
      step: a task's update on a mesh.
      read_batch: (step, rows) → those rows of the step's global batch, a pure function; `SKIPPED` may be with them.
      config: length and intervals.
      workdir: where checkpoints, metrics and pictures go.
      tokens_per_step: for the metrics `tokens` and `tokens_per_second`; 0 omits them.
      flops_per_step: FLOPs of a step by convention (`lvm.model.flops`), for the metrics `mfu_…` on accelerators with a
        known peak.
      memory_advice: text appended to the error when a step runs out of memory.
      times: of this process so far; by default all of it counts as its start.
      branch: workdir and step of another run, whose state a run without checkpoints begins with; None for a fresh one.
      evaluations: by name; their figures and pictures go where those of the task go.
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
        times: Goodput | None = None,
        branch: tuple[str, int] | None = None,
        evaluations: Mapping[str, Evaluation] | None = None,
    ):
        self._branch, self._evaluations = branch, evaluations or {}
        self._step, self._task = step, step.task
        self._read_batch, self._config = read_batch, config
        self._path = workdir.path
        self._memory_advice = memory_advice
        self._times = times or Goodput()
        self._reporter = Reporter(step.mesh, tokens_per_step, flops_per_step or {}, self._times)
        self._checkpoints = Checkpoints(self._path, config.keep, config.keep_every, config.keep_steps)
        self._local = LocalCheckpoints(config.local_checkpoint, self._path, step.state)
        self._preemption, self._watchdog = Preemption(), Watchdog(config.watchdog)
        self._profiler = StepProfiler(self._path, config.profile)
        self._spikes = SpikeDetector(config.spike)
        self._skipped_batches = SkippedBatches.load(self._path)

    def run(self) -> State:
        """Trains to `total_steps` and returns the state.

        Raises:
          DivergedError: too many consecutive steps had no finite gradient, or the rewind limit is reached.
          UserError: a device ran out of memory.
          SystemExit: after SIGTERM, once the step is saved; the exit code is 75.
        """
        with self._preemption, self._watchdog, self._explain_out_of_memory():
            if distributed.is_first() and (record := goodput.read_record(self._path)):
                self._times.continue_from(record)
            state, start = self._start()
            clock = Clock(self._times)
            try:
                while True:
                    with MetricsWriter(self._path, start, self._config.wandb) as self._metrics:
                        try:
                            return self._train(state, start, self._config.total_steps, clock)
                        except SpikeError as error:
                            # The frames hold the state, whose memory the restored one needs.
                            spike = error.with_traceback(None)
                        state, start = self._rewind(spike)
            finally:
                clock.close()
                self._profiler.stop()
                with self._watchdog.pause("the last checkpoint"):
                    self._checkpoints.close()
                    self._local.wait()

    def _write_times(self) -> None:
        self._metrics.write_file(goodput.FILENAME, self._times.record())

    @contextlib.contextmanager
    def _explain_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"out of memory: {reason}; {self._memory_advice()}".rstrip("; ")) from error

    def _start(self) -> tuple[State, int]:
        with self._times.spent_on(goodput.RESTORE):
            local = self._local.latest_intact_step(self._config.total_steps)
            step = self._checkpoints.latest_intact_step(local)
        if step is None:
            self._local.delete_after(0)
            self._times.roll_back(0.0)
            self._spikes.losses.clear()
            return self._start_fresh()
        with self._times.spent_on(goodput.RESTORE):
            if step == local:
                state, meta = self._local.restore(step)
            else:
                log_info(f"{self._path}: resuming from step {step}")
                state, meta = self._checkpoints.restore(step, self._step.state)
            self._local.delete_after(step)
        self._times.roll_back(meta["productive_seconds"])
        self._spikes = SpikeDetector(self._config.spike, meta.get("losses", ()))
        return state, step

    def _start_fresh(self) -> tuple[State, int]:
        if self._branch is None:
            return self._step.init(), 0
        workdir, step = self._branch
        log_info(f"{self._path}: branching off {workdir} at step {step}")
        self._skipped_batches = SkippedBatches.load(workdir)
        if self._skipped_batches.ranges and distributed.is_first():
            self._skipped_batches.save(self._path)
        with self._times.spent_on(goodput.RESTORE):
            state, meta = restore_state(workdir, step, self._step.state)
        self._spikes = SpikeDetector(self._config.spike, meta.get("losses", ()))
        return state, step

    def _rewind(self, spike: SpikeError) -> tuple[State, int]:
        """Rolls back to before a spike and skips its batches. All processes see the same losses, so all call it."""
        self._times.switch(goodput.RESTORE)
        limits, skipped = self._config.spike, self._skipped_batches
        batch = skipped.batch_index(spike.step - 1)
        if skipped.rewinds == limits.max_rewinds:
            self._write_diverged([batch])
            raise DivergedError(
                f"{self._path}: {spike}, and the rewind limit ({limits.max_rewinds}) is reached; its batch is in "
                f"{DIVERGED}"
            )
        with self._watchdog.pause("rolling back"):
            self._checkpoints.wait()
            steps = self._checkpoints.all_steps()
            before_spike = [step for step in steps if step < spike.step - limits.skip_before]
            target = max(before_spike, default=min(steps, default=0))
            # Checkpoints first: a kill in between leads to the same spike again.
            self._local.delete_after(target)
            self._checkpoints.delete_after(target)
            first = skipped.batch_index(max(target, spike.step - 1 - limits.skip_before))
            skipped.add(first, batch)
            if distributed.is_first():
                skipped.save(self._path)
            log_info(f"{spike}; skipping batches {first} to {batch}, rewind {skipped.rewinds}")
            return self._start()

    def _train(self, state: State, start: int, total: int, clock: Clock) -> State:
        self._write_times()
        self._times.switch(goodput.STEPS)
        clock.restart()
        pending: deque[tuple[int, Metrics]] = deque()  # of steps that may still be running
        for step, batch in enumerate(clock.time_input(self._batches(start, total)), start + 1):
            if not self._step.is_compiled(step - 1):
                with clock.paused(state, goodput.COMPILE), self._watchdog.pause("compiling"):
                    self._step.compile(step - 1)
            self._profiler.start_step(step)
            state, metrics = clock.run(self._step, state, batch, step - 1)
            pending.append((step, metrics))
            last = step == total
            self._check_steps(pending, 0 if last else _STEPS_AHEAD)
            self._report(step, state, metrics, clock, last)
            if last or _is_due(step, self._config.picture_every):
                with clock.paused(state, goodput.PICTURES), self._watchdog.pause("rendering pictures"):
                    # Rendered by all processes, written by the first.
                    self._metrics.write_pictures(step, self._task.pictures(state))
            stopping = self._preemption.noticed()
            persistent = last or stopping or _is_due(step, self._config.checkpoint_every)
            persistent = persistent or step in self._config.keep_steps
            local = self._local.is_due(step) and not last
            if persistent or local:
                self._check_steps(pending, 0)
                with clock.paused(state, goodput.SAVE), self._watchdog.pause("saving a checkpoint"):
                    productive = self._times.seconds[goodput.STEPS]
                    meta = {"productive_seconds": productive, "losses": list(self._spikes.losses)}
                    if persistent:
                        self._checkpoints.save(state, step, meta)
                    if local:
                        self._local.save(state, step, meta)
            if stopping:
                started_at = time.monotonic()
                with self._watchdog.pause("the last checkpoint"), self._times.spent_on(goodput.SAVE):
                    self._checkpoints.wait()
                self._write_times()
                log_info(f"SIGTERM: saved at step {step}, after {time.monotonic() - started_at:.1f} s")
                raise SystemExit(EXIT_PREEMPTED)
        with self._watchdog.pause("the last checkpoint"), self._times.spent_on(goodput.SAVE):
            self._checkpoints.wait()
        self._local.remove()
        self._write_times()
        for line in ["time of the run, restarts included:", *self._times.table()]:
            log_info(line)
        return state

    def _batches(self, start: int, total: int) -> Iterator[Batch]:
        read = functools.partial(_read_local, self._read_batch, self._step.rows, self._skipped_batches)
        for batch in loader.prefetch_batches(read, start, total, self._config.input_workers):
            self._reporter.skipped += int(np.sum(batch.get(SKIPPED, 0)))
            yield self._step.shard_batch({name: x for name, x in batch.items() if name != SKIPPED})

    def _check_steps(self, pending: deque[tuple[int, Metrics]], ahead: int) -> None:
        """Waits for all but the latest `ahead` steps, and checks each.

        Raises:
          DivergedError: too many consecutive steps were skipped.
          SpikeError: a loss is a spike.
        """
        while len(pending) > ahead:
            step, metrics = pending.popleft()
            in_row = int(metrics["skipped_in_row"])
            self._watchdog.step_ended()
            if in_row:
                log_info(f"step {step}: the gradient is not finite; skipped, {in_row} in a row")
            if in_row >= self._config.max_skipped:
                indices = [self._skipped_batches.batch_index(n) for n in range(step - in_row, step)]
                self._write_diverged(indices)
                raise DivergedError(
                    f"{self._path}: no finite gradient in {in_row} steps up to {step}; loss "
                    f"{float(metrics['loss'])}; their batches are in {DIVERGED}"
                )
            if not in_row:
                self._spikes.update(step, float(metrics["loss"]))

    def _write_diverged(self, indices: Sequence[int]) -> None:
        """Writes the batches' indices, with hashes of the rows that the first process reads."""
        if distributed.is_first():
            hashes = {}
            for index in indices:
                batch = self._read_batch(index, self._step.rows)
                data = b"".join(batch[name].tobytes() for name in sorted(batch))
                hashes[str(index)] = hashlib.sha256(data).hexdigest()
            files.write_json(self._path / DIVERGED, {"batches": hashes})

    def _report(self, step: int, state: State, metrics: Metrics, clock: Clock, last: bool) -> None:
        values: dict[str, float] = {}
        if last or _is_due(step, self._config.log_every):
            values |= self._reporter.measure(step, metrics, clock)
            self._write_times()
            progress = format_progress(step, self._config.total_steps, 1 / values["step_seconds"])
            log_info(f"{progress}, loss {values['loss']:.4f}")
        if last or _is_due(step, self._config.evaluate_every):
            with clock.paused(state, goodput.EVALUATION), self._watchdog.pause("an evaluation"):
                heldout = self._task.evaluate(state, self._preemption.noticed)
            if heldout:
                log_info("  " + ", ".join(f"{name} {value:.4f}" for name, value in heldout.items()))
            values |= heldout
        for name, evaluation in self._evaluations.items():
            if last or _is_due(step, evaluation.every):
                with clock.paused(state, goodput.EVALUATION), self._watchdog.pause(f"the evaluation {name}"):
                    if (result := evaluation(state, self._preemption.noticed)) is None:
                        break
                    values |= result[0]
                    self._metrics.write_pictures(step, result[1])
        if values:
            self._metrics.write(step, values)


def _read_local(read: ReadBatch, rows: np.ndarray, skipped: SkippedBatches, step: int) -> Mapping[str, np.ndarray]:
    # Not a method of the loop: input workers unpickle it in another process.
    return read(skipped.batch_index(step), rows)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
