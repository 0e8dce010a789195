"""Sweeps submitted to schedulers: golden dry runs, schemas, and what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lvm.hardware.accelerators import resolve
from lvm.launch import gke
from lvm.launch.requests import ClusterConfig, SweepRequest
from lvm.scaling.manifest import FORMAT, Run, Sweep, write_sweep
from tests.commands import run
from tests.test_launch import GKE
from tests.test_launch_files import GOLDEN

RUNS = (Run("a", "runs/a", 10, 5, 100, 1e4, 10), Run("b", "runs/b", 10, 5, 50, 5e3, 5, trunk="a", trunk_step=4))
SWEEP = Sweep(FORMAT, (*RUNS, Run("c", "runs/c", 10, 5, 100, 1e4, 10)))
SUBMIT = ["sweep", "--run=laws", "--accelerator=h100-8", "--commit=HEAD", "--dry_run"]


def test_sweep_slurm_dry_run_golden(tmp_path):
    write_sweep(tmp_path / "sweep", SWEEP)
    folder = tmp_path / "out"
    printed = run("lvm.submit", *SUBMIT, "--parallelism=1", f"--sweep={tmp_path / 'sweep'}", f"--folder={folder}")
    commit = next(folder.glob("*.tar.gz")).name.removesuffix(".tar.gz")
    written = {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix != ".gz"}
    text = "".join(f"=== {name}\n{content}" for name, content in {"commands": printed, **written}.items())
    text = text.replace(commit, "COMMIT").replace(str(tmp_path), "/FOLDER")
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / "slurm-sweep-array.txt").write_text(text)
    assert text == (GOLDEN / "slurm-sweep-array.txt").read_text()
    assert "--array=0-1%1" in printed  # a branch is trained by its trunk's task
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, "--severity=style", folder / "job.sh"], capture_output=True, text=True)
    assert not set(re.findall(r"SC\d+", result.stdout)), result.stdout


def test_sweep_job_is_valid_kubernetes():
    import kubernetes_validate

    site = ClusterConfig(project="p", zone="z", cluster="c", image="i")
    folder = "gs://bucket/sweep"
    request = SweepRequest(
        "laws", folder, site, commit="COMMIT", slice=resolve("h100-8"), workers=7, parallelism=3, folder=folder
    )
    gke.validate(request)
    job = yaml.safe_load(gke.files(request)["job.yaml"])
    kubernetes_validate.validate(job, "1.33", strict=True)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (7, 3)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = ["-m", "lvm.sweep", "run", f"--sweep={folder}", "--max_restarts=3", "--index=$(TASK_INDEX)"]
    assert container["args"][1:] == command


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sweep=/nowhere"], "no sweep.json in this folder"),
        (["--on=gke", "--sweep=/nowhere", *GKE], "hosts share no disk"),
    ],
)
def test_sweep_is_refused_before_submission(tmp_path, more, words):
    assert words in run("lvm.submit", *SUBMIT, f"--folder={tmp_path / 'out'}", *more, code=2)
    assert not (tmp_path / "out").exists()
