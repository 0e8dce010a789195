"""Runs the project's commands in separate processes, as a user would."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
from unittest import mock

import jax

from lvm.common import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data" / "dev"

# Fused kernels through LLVM alone: a step compiles in a third of the time. Later versions have no other way than MLIR.
COMPILER_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""

TINY_DEMO = [
    "--source=tests/configs/tiny_scenes.py",
    "--tokenizer_config=tests/configs/tiny_tokenizer.py",
    "--lvm_config=tests/configs/tiny_lvm.py",
    "--eval_config=tests/configs/tiny_eval.py",
]


def start(module: str, *arguments: str, devices: int = 1, **options) -> subprocess.Popen:
    """Starts a command with the given number of CPU devices; read its output with `communicate`."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=program_environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(module: str, *arguments: str, code: int = 0, devices: int = 1) -> str:
    """Runs a command to its end and returns its output; fails unless it exits with `code`.

    The process is forked from a server that has imported JAX already: importing takes most of a short command's time.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        process = _forkserver().Process(
            target=_run_command, args=(module, [*map(str, arguments)], program_environment(devices), output.name)
        )
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
        text = output.read()
    assert process.exitcode == code, f"exit code {process.exitcode}, expected {code}:\n{text}"
    if code:
        assert "Traceback" not in text, text
    return text


@functools.cache
def _forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["grain", "matplotlib", "scipy.ndimage", "tensorboardX", "lvm.train", "tokenizer.train"]
    )
    with mock.patch.dict(os.environ, program_environment(devices=1)):  # JAX reads some of it when it is imported
        multiprocessing.forkserver.ensure_running()
    return context


class _Stage(multiprocessing.get_context("fork").Process):
    """A stage of the demo, forked instead of started: what `scripts.demo` needs of `subprocess.Popen`.

    Tests that stop a demo, and the one of a single video, start its stages as users do.
    """

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        sys.stdout.flush()
        super().__init__(target=_run_command, args=(command[2], command[3:], env, "/dev/stdout"))
        self.start()

    def wait(self) -> int | None:
        """Returns the exit code when the stage has ended."""
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the stage."""
        assert self.pid is not None
        os.kill(self.pid, number)


def _run_command(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Becomes `python -m MODULE ARGUMENTS` in the project's folder, with stdout and stderr in the file `output`."""
    os.environ.clear()
    os.environ.update(environment)
    # JAX read the variable when the server imported it.
    jax.config.update("jax_disable_most_optimizations", environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "True")
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [module, *arguments]
    try:
        command = importlib.import_module(module)
        if module == "scripts.demo":
            mock.patch.object(command, "subprocess", types.SimpleNamespace(Popen=_Stage)).start()
        cli.exit_process(command.main(arguments))
    finally:
        atexit._run_exitfuncs()  # as at the end of a program; multiprocessing skips them


def program_environment(devices: int) -> dict[str, str]:
    """Environment variables of a command with the given number of CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={devices}",
    }


def compilation_cache() -> str:
    """A temporary folder that this process, its workers and their commands share; it is removed when this one ends."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="lvm-programs-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


def comparable_results(results: pathlib.Path) -> dict:
    """The figures of a results.json, without the folders that it names."""
    figures = json.loads(results.read_text())
    del figures["request"]
    return figures
