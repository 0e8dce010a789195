"""Multi-process runs: joining processes, process-zero work, gathering arrays, agreeing on preemption."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from lvm.common.commands import report_error
from lvm.common.errors import EXIT_ALONE, UserError
from lvm.common.logging import log_info, log_warning, set_process
from lvm.common.validation import check_positive

T = TypeVar("T")
_ABORT_DELAY_S = 60  # by which JAX's own timeout, which aborts the process, is longer
# Environment variables set by our launchers. COORDINATOR="auto" alone leaves it to JAX to detect the cluster.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "LVM_COORDINATOR", "LVM_NUM_PROCESSES", "LVM_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Timeouts in seconds.

    Attributes:
      initialization_timeout: for all processes to join. Processes that are late, or restart meanwhile, are waited for;
        after this long the process exits with 77, which counts as a failure.
      heartbeat_timeout: a process without a heartbeat for this long counts as dead, and the others end.
    """

    initialization_timeout: int = 3600
    heartbeat_timeout: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "initialization_timeout", "heartbeat_timeout")


def join(config: DistributedConfig) -> None:
    """Initializes `jax.distributed` if the environment describes a run of several processes.

    Either our launchers' variables (`LVM_COORDINATOR`, `LVM_NUM_PROCESSES`, `LVM_PROCESS_ID`) or a cluster that JAX
    detects (Slurm, multi-host TPUs). Must be called before anything asks for devices.

    Raises:
      UserError: a launcher's variables are incomplete or malformed, or JAX detects no cluster.
    """
    launcher = {name: os.environ.get(name, "") for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    options: dict[str, Any] = {
        "initialization_timeout": config.initialization_timeout + _ABORT_DELAY_S,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
    }
    if launcher[COORDINATOR] != "auto" and any(launcher.values()):
        if not all(launcher.values()):
            missing = [name for name, value in launcher.items() if not value]
            raise UserError(f"{', '.join(missing)}: not set, but other variables of the launcher are")
        options["coordinator_address"] = launcher[COORDINATOR]
        for key, name in (("num_processes", NUM_PROCESSES), ("process_id", PROCESS_ID)):
            if not launcher[name].isdecimal():
                raise UserError(f"{name}={launcher[name]}: not a number")
            options[key] = int(launcher[name])
    elif launcher[COORDINATOR] != "auto" and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Processes reach each other directly where http_proxy is set; JAX's warning about that can go.
    os.environ.setdefault("grpc_proxy", "")
    jax.config.update("jax_check_proxy_envs", False)
    try:
        with _exit_after(config.initialization_timeout):
            jax.distributed.initialize(**options)
    except ValueError as error:
        raise UserError(f"{COORDINATOR}={launcher[COORDINATOR]}: the processes can't join: {error}") from error
    set_process(jax.process_index(), jax.process_count())
    log_info(f"{jax.process_count()} processes, {jax.device_count()} devices")


@contextlib.contextmanager
def _exit_after(timeout_s: int) -> Iterator[None]:
    """Ends the process unless all processes join in time. JAX itself would abort, like a process that crashes."""

    def exit_alone() -> None:
        reason = f"the other processes of the run have not joined in {timeout_s} s"
        report_error(f"{reason} (config.distributed.initialization_timeout)", EXIT_ALONE)
        os._exit(EXIT_ALONE)

    timer = threading.Timer(timeout_s, exit_alone)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_cluster() -> bool:
    environment = os.environ
    tasks = environment.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in environment else "1"
    under_srun = tasks != "1" and "SLURM_STEP_NODELIST" in environment
    if tasks != "1" and not under_srun:
        log_warning(f"SLURM_NTASKS={tasks}, but this is no step of srun: running as one process; use srun for {tasks}")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return under_srun or len(hosts) > 1 or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1


def is_first() -> bool:
    """True on process zero, which writes what a run writes once."""
    # Asking a single process for its index would initialize its accelerator.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _num_processes() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(number: int) -> int:
    """Returns process zero's integer, in [0, 2⁶²), on all processes."""
    if _num_processes() == 1:
        return number
    halves = np.array([number >> 31, number & 0x7FFFFFFF], np.int32)  # JAX truncates 64-bit integers
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return (int(high) << 31) + int(low)


def on_process_zero(function: Callable[[], T]) -> T | None:
    """Calls `function` on process zero and returns its result there, None elsewhere.

    Raises:
      UserError: on all processes, if `function` raised it.
    """
    result, problem = None, None
    if is_first():
        try:
            result = function()
        except UserError as error:
            problem = error
    if broadcast(int(problem is not None)):
        raise problem or UserError("process 0 failed; see its message")
    return result


def fetch(array: jax.Array) -> np.ndarray:
    """Gathers a global array on every process. A collective: all processes must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather(values: Shaped[np.ndarray, " *shape"]) -> Shaped[np.ndarray, " processes *shape"]:
    """Gathers a small host array of each process, all of one shape, on every process. All processes must call it."""
    return np.asarray(multihost_utils.process_allgather(values)) if _num_processes() > 1 else values[None]


def map_rows(function: Callable[[np.ndarray], np.ndarray], rows: Shaped[np.ndarray, "n ..."]) -> np.ndarray:
    """Applies a function of rows, each independent of the others: every process to its share, gathered on all."""
    if (count := _num_processes()) == 1:
        return function(rows)
    share = -(-len(rows) // count)
    padded = np.concatenate([rows, np.repeat(rows[-1:], share * count - len(rows), axis=0)])
    results = gather(function(padded[jax.process_index() * share :][:share]))  # [processes, share, ...]
    return results.reshape(-1, *results.shape[2:])[: len(rows)]


class Preemption:
    """Context that reports a SIGTERM sent to any process at a step on which all processes agree.

    A single process learns of it at its next `noticed` call; for several, JAX's preemption service picks the first call
    that none has made yet. All processes must call `noticed` equally often.
    """

    def __init__(self) -> None:
        self._num_calls = 0
        self._noticed = False

    def __enter__(self) -> Preemption:
        # With several processes, JAX's preemption service has installed its own handler.
        self._previous = signal.signal(signal.SIGTERM, self._notice) if _num_processes() == 1 else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = True

    def noticed(self) -> bool:
        """True once the run should save and exit."""
        self._num_calls += 1
        if _num_processes() > 1 and not self._noticed:
            self._noticed = multihost_utils.reached_preemption_sync_point(self._num_calls)
        return self._noticed
