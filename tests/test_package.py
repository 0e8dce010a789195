"""The wheel, installed without its checkout, from another directory."""

import json
import os
import subprocess
import sys

import pytest

import lvm
from tests.commands import ROOT, TINY_DEMO


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs Python with the wheel's content on its path, in an empty directory."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run([*pip, *wheel], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", f"--target={folder / 'site'}", str(path)], check=True)
    (folder / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "JAX_PLATFORMS": "cpu"}

    def run(*arguments, code=0):
        command = [sys.executable, *arguments]
        options = {"cwd": folder / "work", "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == code, done.stderr
        return done

    return run


def test_wheel_has_api_version_and_data(installed):
    program = """
import pathlib, lvm, tokenizer
from lvm import LVM
from tokenizer import Tokenizer
site = pathlib.Path(lvm.__file__).parents[1]
print(lvm.__version__, site.name, pathlib.Path(tokenizer.__file__).parents[1] == site)
print(sorted(path.name for path in site.rglob("*") if path.suffix in (".sh", ".in", ".typed")))
"""
    first, files = installed("-c", program).stdout.splitlines()
    assert first == f"{lvm.__version__} site True"
    tracked = subprocess.run(["git", "ls-files", "lvm", "tokenizer"], cwd=ROOT, capture_output=True, text=True).stdout
    expected = [path.rpartition("/")[2] for path in tracked.split() if path.endswith((".sh", ".in", ".typed"))]
    assert files == str(sorted(expected))


def test_wheel_lists_commands(installed):
    assert "  train " in installed("-m", "lvm", "--help").stdout
    assert "  encode " in installed("-m", "tokenizer", "--help").stdout


def test_wheel_runs_demo_commands(installed):
    """On the tests' tiny configs; configs that these import come from the wheel."""
    configs = dict(flag.removeprefix("--").split("=") for flag in TINY_DEMO)
    path = {name: str(ROOT / config) for name, config in configs.items()}
    source = f"--config.data.source={path['source']}"
    shared = ("--config.loop.total_steps=8", "--config.loop.picture_every=0", "--config.loop.evaluate_every=0")
    tokenizer_config, lvm_config = (f"--config={path[name]}" for name in ("tokenizer_config", "lvm_config"))
    commands = [
        ["tokenizer", "train", tokenizer_config, "--workdir=tokenizer", source, *shared],
        ["tokenizer", "encode", "--tokenizer=tokenizer", f"--source={path['source']}", "--out=store"],
        ["lvm", "inspect", "store"],
        ["lvm", "train", lvm_config, "--workdir=lvm", "--config.data.store=store", *shared],
    ]
    # In one process: each would spend most of its time on imports.
    program = """
import json, sys
from lvm.common.commands import dispatch
for package, *arguments in json.loads(sys.argv[1]):
    assert dispatch(package, arguments) == 0, arguments
"""
    assert "all checksums" in installed("-c", program, json.dumps(commands)).stdout


def test_wheel_cannot_ship_code(installed):
    arguments = [
        "--on=slurm",
        "--run=a",
        "--config=configs/lvm_1b.py",
        "--workdir=/w",
        "--nodes=1",
        "--gpus_per_node=8",
    ]
    error = installed("-m", "lvm", "submit", *arguments, "--dry_run", code=2).stderr
    assert "pip install -e ." in error
    assert error.count("\n") == 1
