"""Several processes as one run: joining them, agreeing among them, and fetching what is spread over them."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lvm.common.errors import UserError
from lvm.common.logging import log_info

T = TypeVar("T")
# What a launcher of ours tells each process; the first alone, as "auto", is where JAX finds the others by itself.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "LVM_COORDINATOR", "LVM_NUM_PROCESSES", "LVM_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How long processes wait for each other, in seconds.

    Attributes:
      initialization_timeout: for all to have joined.
      heartbeat_timeout: without a sign of life before a process counts as dead, and the rest end.
    """

    initialization_timeout: int = 300
    heartbeat_timeout: int = 100

    def __post_init__(self) -> None:
        for name in ("initialization_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")


def join(config: DistributedConfig) -> None:
    """Joins this process to the others of its run, if the environment says that there are any.

    That is a launcher of ours (`LVM_COORDINATOR`, `LVM_NUM_PROCESSES`, `LVM_PROCESS_ID`), or what JAX recognises:
    Slurm, TPUs of several hosts. Must come before anything asks for devices.

    Raises:
      UserError: a launcher's variables are incomplete.
    """
    named = {name: os.environ.get(name, "") for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    options: dict[str, Any] = {
        "initialization_timeout": config.initialization_timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
    }
    if named[COORDINATOR] != "auto" and any(named.values()):
        if not all(named.values()):
            missing = [name for name, value in named.items() if not value]
            raise UserError(f"{', '.join(missing)}: not set, but other variables of a launcher are")
        options["coordinator_address"] = named[COORDINATOR]
        options["num_processes"] = int(named[NUM_PROCESSES])
        options["process_id"] = int(named[PROCESS_ID])
    elif named[COORDINATOR] != "auto" and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)
    log_info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def _in_cluster() -> bool:
    environment = os.environ
    under_srun = "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return under_srun or len(hosts) > 1 or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1


def is_first() -> bool:
    """Whether this process writes what is written once."""
    # Asking a single process for its index would take hold of its accelerator.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _num_processes() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(number: int) -> int:
    """The first process's number (below 2⁶²), on all processes."""
    if _num_processes() == 1:
        return number
    halves = np.array([number >> 31, number & 0x7FFFFFFF], np.int32)  # JAX would cut 64 bits to 32
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return (int(high) << 31) + int(low)


def on_process_zero(function: Callable[[], T]) -> T | None:
    """Calls `function` on the first process alone; where that fails, all processes fail.

    Returns:
      What it returned, on the first process; None on the others.

    Raises:
      UserError: what it raised, or on the others that the first process refused.
    """
    found, problem = None, None
    if is_first():
        try:
            found = function()
        except UserError as error:
            problem = error
    if broadcast(int(problem is not None)):
        raise problem or UserError("the first process refused to go on: its message says why")
    return found


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on every process; all must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Preemption:
    """Notices SIGTERM, to any process, at a moment that all of them agree on.

    With one process that is the next time it asks; with several, JAX's preemption service finds the first moment
    that all have yet to reach. All processes must ask equally often. Use as a context.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._noticed = False

    def __enter__(self) -> Preemption:
        # The service of several processes has put its own handler there.
        self._previous = signal.signal(signal.SIGTERM, self._notice) if _num_processes() == 1 else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = True

    def noticed(self) -> bool:
        """Whether to save and end now. Stays true."""
        self._asked += 1
        if _num_processes() > 1 and not self._noticed:
            self._noticed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._noticed
