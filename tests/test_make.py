"""Targets of the Makefile run their commands in environments that they make."""

import os
import subprocess

import pytest

from tests.commands import ROOT


def plan(*arguments: str) -> str:
    """Output of `make --dry-run`."""
    # Variables of the make that runs this test, such as PYTHON, would be passed on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment.pop("PYTHON", None)
    done = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "bin/python -m scripts.demo"),
        ("test", 'pytest -m "not slow and not parity"'),
        ("test-slow", 'pytest -m "(slow and not alone) or'),
        ("test-slow", "pytest -m alone"),
        ("test-parity", "pytest -m parity"),
        ("test-compat", ".venv-compat/bin/python -m pytest -m parity tests/lvm/test_convert_parity.py"),
        ("test-browser", "pytest -m browser"),
        ("lint", "ruff check"),
    ],
)
def test_make_target_runs_its_command(target, command):
    assert command in plan(target)


def test_make_demo_passes_fresh_and_images():
    assert "--fresh" not in plan("demo")
    assert "--fresh" not in plan("demo", "FRESH=0")
    assert "--fresh" in plan("demo", "FRESH=1")
    assert '--images="my photos"' in plan("demo", "IMAGES=my photos")


def test_make_python_has_its_own_environment():
    assert ".venv-python3.12/bin/python -m pytest" in plan("test", "PYTHON=python3.12")
