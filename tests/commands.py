"""Runs the project's commands as a user would: in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data" / "dev"

TINY_DEMO = [
    "--source=tests/configs/tiny_scenes.py",
    "--tokenizer_config=tests/configs/tiny_tokenizer.py",
    "--lvm_config=tests/configs/tiny_lvm.py",
    "--eval_config=tests/configs/tiny_eval.py",
]


def start(module: str, *arguments: str, devices: int = 1, **options) -> subprocess.Popen:
    """A command of the project, started on as many CPU devices; its output is read with `communicate`."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=_environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(module: str, *arguments: str, code: int = 0, devices: int = 1) -> str:
    """Runs a command to its end and returns what it printed; fails unless it exits with `code`."""
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"arguments": [module, *map(str, arguments)], "environment": _environment(devices)}
        server = _server()
        assert server.stdin
        assert server.stdout
        print(json.dumps({**request, "output": output.name}), file=server.stdin, flush=True)
        found = json.loads(server.stdout.readline())
        said = output.read()
    assert found == code, f"exit code {found}, wanted {code}:\n{said}"
    if code:
        assert "Traceback" not in said, said
    return said


def _environment(devices: int) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": _programs(),  # many commands here compile the same small programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


@functools.cache
def _programs() -> str:
    """A folder of this process's own, gone at its end."""
    folder = tempfile.mkdtemp(prefix="lvm-programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _server() -> subprocess.Popen:
    """What `tests.prefork` is; it ends with this process, whose pipe it reads."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.prefork"],
        cwd=ROOT,
        env=_environment(1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
