"""Benchmark of whole runs with the store on object storage: an object server on this machine with faults.

    python -m scripts.benchmark_remote_run            50 steps of 8 processes by `lvm submit --on=local`
    python -m scripts.benchmark_remote_run --start    bytes that 1 and 4 processes read before the first step

The server delays and fails as that of `scripts.benchmark_remote`. The model is tiny: this is about the reads.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from unittest import mock

from lvm import train
from lvm.common import cli, distributed
from lvm.data.mixture import loader
from lvm.launch.local import free_port
from lvm.training import metrics
from lvm.training.step import Step
from scripts import benchmark_store
from scripts.benchmark_remote import served, statistics

STORE, STEPS, PROCESSES = "gs://bucket/store", 50, 8
BATCH, CONTEXT, HELDOUT_BATCHES = 16, 1028, 2  # a row has the codes of four images
_FIRST_STEP, _QUIET_S = "first step", 2.0
_MODEL = {"hidden_size": 32, "mlp_size": 48, "num_layers": 2, "num_heads": 2, "context": CONTEXT}
_OTHERS = ("video", "segmentation", "depth", "edges")  # components of the demo


def flags(workdir: pathlib.Path, steps: int) -> list[str]:
    """Flags of `lvm train`: single images of the served store, 1/512 of them held out."""
    values: dict[str, object] = {f"model.{name}": value for name, value in _MODEL.items()}
    values |= {f"data.components.{name}.weight": 0.0 for name in _OTHERS}
    values |= {"data.components.single.weight": 1.0, "data.heldout_fraction": 2**-9, "data.store": STORE}
    values |= {"optimizer.warmup_steps": 0, "batch_size": BATCH, "heldout_batches": HELDOUT_BATCHES}
    values |= {"loop.total_steps": steps, "loop.log_every": 5, "loop.evaluate_every": 25, "loop.picture_every": 0}
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/demo_lvm.py", f"--workdir={workdir}", *arguments]


def measure_run(folder: pathlib.Path, processes: int, steps: int) -> int:
    """Trains by `lvm submit`, and prints losses, speed and the server's counters; returns the exit code."""
    workdir = folder / "run"
    command = ["lvm.submit", "--on=local", f"--processes={processes}", "--max_restarts=0", *flags(workdir, steps)]
    with served(folder) as environment:
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command], env=_environment(environment), check=False).returncode
        seconds, counts = time.monotonic() - began, statistics(environment)
    lines = metrics.read_metrics(workdir)
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"{processes} processes, {steps} steps: exit code {code}, {seconds:.0f} s in all")
    if losses:
        (heldout_loss,) = [line["heldout_loss"] for line in lines if "heldout_loss" in line][-1:]
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}, held-out {heldout_loss:.4f}")
        speeds = sorted(1 / line["step_seconds"] for line in lines if "step_seconds" in line)
        waits = sorted(line["input_wait_fraction"] for line in lines if "input_wait_fraction" in line)
        print(f"{speeds[len(speeds) // 2]:.2f} steps/s, waiting for input {waits[len(waits) // 2]:.1%}, medians")
    faults = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("slow", "errors", "drops"))
    print(f"{counts['requests']} requests, {counts['bytes'] / 2**20:.1f} MiB; of the requests {faults}")
    return code


def measure_start(folder: pathlib.Path, processes: int) -> list[tuple[int, int]]:
    """Bytes that each process reads before its first step, and those that it owns; each process has its own server.

    A process owns the store's manifest files, which all need, and the codes, two bytes each, in its rows of the
    held-out batches, of the first batch and of those that the loader keeps ready.
    """
    manifests = sum(path.stat().st_size for path in (folder / "bucket" / "store").glob("manifest.*"))
    rows = BATCH // processes * (HELDOUT_BATCHES + 1 + loader.PREFETCH)
    owned = manifests + rows * CONTEXT * 2
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(served(folder)) for _ in range(processes)]
        ranks = [stack.enter_context(rank) for rank in _ranks(folder / f"start-{processes}", servers)]
        for rank in ranks:
            stack.callback(rank.kill)
        for rank in ranks:
            assert rank.stdout is not None
            output = ""
            while _FIRST_STEP not in output:
                line = rank.stdout.readline()
                if not line:
                    raise RuntimeError(f"a process ended before its first step:\n{output}")
                output += line
        counts = [statistics(server) for server in servers]
        while True:  # until nothing more is read ahead
            time.sleep(_QUIET_S)
            before, counts = counts, [statistics(server) for server in servers]
            if counts == before:
                return [(count["bytes"], owned) for count in counts]


def _ranks(workdir: pathlib.Path, servers: Sequence[dict[str, str]]) -> Iterator[subprocess.Popen[str]]:
    """Processes of one run that stop at their first step."""
    command = [sys.executable, "-m", "scripts.benchmark_remote_run", "--stop", *flags(workdir, STEPS)]
    address = f"localhost:{free_port()}"
    for rank, server in enumerate(servers):
        variables = {distributed.NUM_PROCESSES: str(len(servers)), distributed.PROCESS_ID: str(rank)}
        variables = {distributed.COORDINATOR: address, **variables} if len(servers) > 1 else {}
        environment = _environment(server) | variables
        yield subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _environment(variables: dict[str, str]) -> dict[str, str]:
    device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return {**os.environ, **device, cli.PARENT: str(os.getpid()), **variables}


def _stop_at_first_step(argv: Sequence[str]) -> int:
    """`lvm train`, which prints a line in place of its first step and then does nothing more, but reads ahead."""

    def stop(*_: object) -> None:
        print(_FIRST_STEP, flush=True)
        time.sleep(3600)

    with mock.patch.object(Step, "__call__", stop):
        return train.main(argv)


def _run(args: cli.Args) -> int:
    print(f"{os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "bucket" / "store").mkdir(parents=True)
        benchmark_store.make_store(folder / "bucket" / "store", args.scenes, 1)
        if not args.start:
            return measure_run(folder, args.processes, args.steps)
        for processes in (1, 4):
            for rank, (read, owned) in enumerate(measure_start(folder, processes)):
                print(f"process {rank} of {processes}: reads {read:,} bytes, owns {owned:,}: {read / owned:.2f}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--stop"]:
        return _stop_at_first_step(argv[1:])
    flags = cli.Flags(__doc__)
    flags.boolean("start", False, "measure the bytes before the first step instead")
    flags.integer("scenes", 100_000, "scenes of the store", lower_bound=80_000)
    flags.integer("processes", PROCESSES, "processes of the run", lower_bound=1)
    flags.integer("steps", STEPS, "steps of the run", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
