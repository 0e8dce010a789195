"""README's commands at tiny size, in environments that other machines have."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.commands import ROOT, program_environment

_TINY = {
    "configs/demo_tokenizer.py": "tests/configs/tiny_tokenizer.py",
    "configs/demo_scenes.py": "tests/configs/tiny_scenes.py",
    "configs/demo_lvm.py": "tests/configs/tiny_lvm.py",
    "configs/eval_demo.py": "tests/configs/tiny_eval.py",
    "convert SRC DST": "convert runs/tokenizer runs/published",
    "--batches=200": "--batches=20",
    "--processes=2": "--processes=2 --out=runs/local",
    "--dry_run": "--dry_run --noplan --ship_changes --out=runs/submitted",
}
_NO_LOCKS = """
import errno, fcntl, os
def flock(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""
_ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_PROXY = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9")
_UNKNOWN_USER = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]


def readme_commands(folder: pathlib.Path) -> list[list[str]]:
    """The arguments of each `lvm …` and `python -m …` of README, with tiny configs and outputs in `folder`."""
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL):
        for line in block.splitlines():
            for long, tiny in _TINY.items():
                line = line.replace(long, tiny)
            line = re.sub(r"([= ])(runs/|[abqxy]\w*\.png)", rf"\g<1>{folder}/\g<2>", line)
            words = shlex.split(line.replace(":y.png", f":{folder}/y.png"), comments=True)
            if words[:1] == ["lvm"]:
                commands.append(["-m", "lvm", *words[1:]])
            elif words[:2] == ["python", "-m"]:
                commands.append(words[1:])
    return commands


@pytest.mark.alone
@pytest.mark.parametrize("environment", ["unknown_user", "ascii", "no_locks", "proxy"])
def test_readme_commands_run(tmp_path, environment):
    if environment == "unknown_user" and (
        not shutil.which("unshare") or subprocess.run([*_UNKNOWN_USER, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine makes no user namespaces")
    prefix = _UNKNOWN_USER if environment == "unknown_user" else []
    variables = program_environment(devices=1) | {"ascii": _ASCII, "proxy": _PROXY}.get(environment, {})
    if environment == "unknown_user":
        variables = {name: value for name, value in variables.items() if name not in ("HOME", "USER", "LOGNAME")}
    if environment == "no_locks":
        (tmp_path / "sitecustomize.py").write_text(_NO_LOCKS)
        variables["PYTHONPATH"] = str(tmp_path)
    rng = np.random.default_rng(0)
    for name in "abqxy":
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    losses = (f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}" for n in (1e7, 1e8, 1e9) for d in (1e8, 1e9, 1e10))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "runs.csv").write_text("\n".join(["params,tokens,loss", *losses]))
    commands = readme_commands(tmp_path)
    assert len(commands) >= 12
    failed = []
    for command in commands:
        started_at = time.monotonic()
        result = subprocess.run(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        output = result.stdout.decode(errors="replace")
        print(f"$ {shlex.join(command)}\n{output}exit code {result.returncode}, {time.monotonic() - started_at:.0f} s")
        if "Traceback" in output or result.returncode:
            failed.append(shlex.join(command))
    assert not failed
