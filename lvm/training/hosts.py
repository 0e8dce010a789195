"""Per-host figures of a run of several processes: what each waits for, skips, and which one is slow.

A step is synchronous, so all processes take the same time for it. Two figures tell the slow one: `idle`, how long the
devices of a process had nothing to do because their host was late (those of the others are busy waiting in a
collective), and `probe`, how long a fixed computation without communication takes on its slowest device.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lvm.common import distributed
from lvm.common.logging import log_info, log_warning

SLOW = 1.2  # times the median, from which a process is a straggler
_LAPS = 3  # in a row, before it is named
_NAME_BYTES = 64
_PROBE_RUNS = 3
_PROBE_SIZE, _PROBE_SIZE_CPU, _PROBE_STEPS = 1024, 128, 256  # 0.6 TFLOP in bfloat16: about 3 ms


@dataclasses.dataclass(frozen=True)
class HostFigures:
    """Figures of each process since the previous lap, float32 [processes].

    Attributes:
      input_wait: seconds of a step that it waited for its batch.
      idle: seconds of a step that its devices had nothing to do.
      probe: seconds of the probe on its slowest device.
      skipped: sentences that it left out as damaged, since it started.
    """

    input_wait: Float[np.ndarray, " processes"]
    idle: Float[np.ndarray, " processes"]
    probe: Float[np.ndarray, " processes"]
    skipped: Float[np.ndarray, " processes"]

    def slowness(self, step_seconds: float) -> Float[np.ndarray, " processes"]:
        """Time of a step at the pace of each process, relative to that of the median one."""
        lag = self.idle - statistics.median_low(self.idle.tolist())
        host = step_seconds / np.maximum(step_seconds - lag, 1e-3 * step_seconds)
        return np.maximum(host, self.probe / max(statistics.median_low(self.probe.tolist()), 1e-9))


class Hosts:
    """Gathers the figures of all processes with one all-gather a lap, and names a straggler. All must call it."""

    def __init__(self) -> None:
        name = platform.node().encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        names = distributed.gather(np.frombuffer(name, np.uint8))
        self._names = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in names]
        self._probe = DeviceProbe() if len(names) > 1 else None
        self._stragglers, self._skipped = StragglerDetector(), np.zeros(len(self._names))

    def gather(self, input_wait: float, idle: float, skipped: int) -> HostFigures:
        """The figures of all processes; devices must be idle. Logs new skips."""
        probe = self._probe.seconds() if self._probe else 0.0
        own = np.array([input_wait, idle, probe, skipped], np.float32)
        figures = HostFigures(*distributed.gather(own).T)
        self._log_skips(figures.skipped)
        return figures

    def _log_skips(self, skipped: np.ndarray) -> None:
        if (skipped > self._skipped).any():
            worst, num_hosts = int(skipped.argmax()), int((skipped > 0).sum())
            _warn(
                f"damaged data: {int(skipped.sum())} sentences skipped since the last start, by {num_hosts} of "
                f"{len(skipped)} processes; most, {int(skipped[worst])}, by {self.describe(worst)}"
            )
        self._skipped = skipped

    def metrics(self, figures: HostFigures, step_seconds: float) -> dict[str, float]:
        """Metrics `hosts/…` of a lap, none for one process; logs which process is a straggler, when that changes."""
        skips = {"skipped_sentences": float(figures.skipped.sum())} if figures.skipped.any() else {}
        if len(self._names) == 1:
            return skips
        slowness = figures.slowness(step_seconds)
        slowest = int(slowness.argmax())
        change = self._stragglers.update(slowness)
        if change is not None and change >= 0:
            medians = [statistics.median_low(x.tolist()) for x in (figures.idle, figures.input_wait, figures.probe)]
            _warn(
                f"straggler: {self.describe(change)} takes {slowness[change]:.1f} × the median's time; devices idle "
                f"{figures.idle[change]:.3g} s a step (median {medians[0]:.3g}), input wait "
                f"{figures.input_wait[change]:.3g} s ({medians[1]:.3g}), a fixed matmul "
                f"{1e3 * figures.probe[change]:.3g} ms ({1e3 * medians[2]:.3g})"
            )
        elif change is not None:
            log_info("no straggler any more")
        return {
            "hosts/input_wait_max": float(figures.input_wait.max()),
            "hosts/idle_max": float(figures.idle.max()),
            "hosts/slowness_max": float(slowness[slowest]),
            "hosts/slowest": slowest,
        } | skips

    def describe(self, process: int) -> str:
        """`process 17 (host-17)`."""
        return f"process {process} ({self._names[process]})"


class StragglerDetector:
    """Tells when a process has been a straggler for some laps in a row, and when none is any more."""

    def __init__(self) -> None:
        self._named, self._candidate, self._laps = -1, -1, 0

    def update(self, slowness: Float[np.ndarray, " processes"]) -> int | None:
        """The process that has become the straggler, -1 if there is none any more, None without a change."""
        slowest = int(slowness.argmax())
        candidate = slowest if slowness[slowest] > SLOW else -1
        self._laps = self._laps + 1 if candidate == self._candidate else 1
        self._candidate = candidate
        if self._laps < _LAPS or candidate == self._named:
            return None
        self._named = candidate
        return candidate


class DeviceProbe:
    """A fixed computation on each of this process's devices, without communication."""

    def __init__(self) -> None:
        devices = jax.local_devices()
        on_cpu = devices[0].platform == "cpu"
        size, dtype = (_PROBE_SIZE_CPU, jnp.float32) if on_cpu else (_PROBE_SIZE, jnp.bfloat16)
        self._inputs = [jax.device_put(jnp.full((size, size), 0.01, dtype), device) for device in devices]
        self._run = jax.jit(lambda x: jax.lax.fori_loop(0, _PROBE_STEPS, lambda _, y: jnp.tanh(x @ y).astype(dtype), x))
        self.seconds()  # compiles

    def seconds(self) -> float:
        """Time of the slowest device; the least of some runs, since other work on the host delays single ones."""
        times = []
        for _ in range(_PROBE_RUNS):
            before = time.monotonic()
            jax.block_until_ready([self._run(x) for x in self._inputs])
            times.append(time.monotonic() - before)
        return min(times)


def _warn(message: str) -> None:
    """Logs a warning about the whole run, from the first process alone."""
    if distributed.is_first():
        log_warning(message)
