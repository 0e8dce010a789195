"""Four processes train together; the one that is slowed is named."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from lvm.common import distributed, logging
from lvm.common.distributed import DistributedConfig
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import metrics
from lvm.training.loop import Loop, LoopConfig
from lvm.training.step import Step
from lvm.training.workdir import Workdir
from tests.commands import ROOT, program_environment
from tests.lvm.training.test_loop import Regression, read_batch

PROCESSES, SLOW = 4, 2


@contextlib.contextmanager
def half_stopped(process):
    """Stops a process for half of the time, as if its processor were half as fast."""
    ended = threading.Event()

    def stop():
        while not ended.wait(0.01):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.alone
@pytest.mark.parametrize("cause", ["input", "processor"])
def test_slowed_process_of_four_is_named(tmp_path, cause):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lvm.training.test_stragglers", str(tmp_path / "run"), cause],
            cwd=ROOT,
            env=program_environment(devices=1)
            | {distributed.COORDINATOR: address}
            | {distributed.NUM_PROCESSES: str(PROCESSES), distributed.PROCESS_ID: str(index)},
            stdout=subprocess.DEVNULL,
            stderr=open(tmp_path / f"{index}.log", "wb"),  # noqa: SIM115 (of the process)
        )
        for index in range(PROCESSES)
    ]
    with half_stopped(processes[SLOW]) if cause == "processor" else contextlib.nullcontext():
        codes = [process.wait(300) for process in processes]
    log = (tmp_path / "0.log").read_text("utf-8")
    assert codes == [0] * PROCESSES, log
    lines = metrics.read_metrics(tmp_path / "run")
    print(log[-4000:], [(line["hosts/slowest"], round(line["hosts/slowness_max"], 2)) for line in lines])
    assert f"straggler: process {SLOW} ({os.uname().nodename}) takes " in log
    if cause == "input":
        assert set(re.findall(r"straggler: process (\d)", log)) == {str(SLOW)}
        assert lines[-1]["badput/straggler"] > lines[-1]["badput/input"]


def main(workdir, cause):
    """Trains as one process; the slow one waits for its batches."""
    logging.configure()
    distributed.join(DistributedConfig())
    seconds = 0.2 if cause == "input" and jax.process_index() == SLOW else 0.02

    def read(step, rows):
        time.sleep(seconds)
        return {name: x[rows] for name, x in read_batch(step).items()}

    step = Step(Regression(), make_mesh(MeshConfig()), seed=0)
    config = LoopConfig(total_steps=200, log_every=10, evaluate_every=0, picture_every=0, checkpoint_every=0)
    Loop(step, read, config, Workdir(workdir, "lvm", {"config": {}})).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
