"""Runs the project's commands as a user would: in processes of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

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
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(module: str, *arguments: str, code: int = 0, devices: int = 1) -> str:
    """Runs a command to its end and returns what it printed; fails unless it exits with `code`."""
    process = start(module, *arguments, devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, wanted {code}:\n{output}"
    if code:
        assert "Traceback" not in output, output
    return output
