"""Flags of `lvm submit` that are rejected, each with the reason."""

import pytest

from tests.commands import run
from tests.test_launch import CLOUD, GKE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on=tpu-vm", "--run=A_b", "--workdir=gs://b"], "--run='A_b'"),
        (["--on=tpu-vm", "--workdir=gs://b"], "--run: required"),
        (["--on=tpu-vm", "--run=a", "--workdir=gs://b"], "--project, --zone: required"),
        (["--on=tpu-vm", "--run=a", "--workdir=/tmp/b", *CLOUD, "--accelerator=v4-32"], "use gs://"),
        (["--on=tpu-vm", "--run=a", "--workdir=gs://b", *CLOUD, "--accelerator=h100-8"], "use a TPU slice"),
        (["--on=tpu-vm", "--run=a", "--workdir=gs://b", *CLOUD, "--accelerator=v4-33"], "no such slice"),
        (["--on=tpu-vm", "--run=a", "--workdir=gs://b", "--spot", "--reserved"], "--spot, --reserved: use one"),
        (["--on=tpu-vm", "--run=a", "--workdir=gs://b", "--processes=2"], "--processes: has no effect with"),
        (["--on=gke", "--run=a", "--workdir=gs://b", "--sweep=seed=1,2"], "--sweep: has no effect with --on=gke"),
        (["--on=gke", "--run=a", "--workdir=gs://b", *GKE], "--accelerator: required"),
        (["--on=gke", "--run=a", "--workdir=gs://b", *GKE, "--accelerator=v4-32", "--queued"], "set --queue"),
        (["--on=slurm", "--run=a", "--workdir=runs/b"], "--workdir=runs/b"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--sweep=seed"], "--sweep='seed'"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--accelerator=v4-32"], "--accelerator=v4-32"),
        (["--on=local", "--workdir=/tmp/b", "--accelerator=v4-32"], "--accelerator: has no effect with --on=local"),
        (["--on=local", "--workdir=/tmp/b", "--secret=NOBODY_HAS_THIS"], "NOBODY_HAS_THIS not set"),
        (["--on=local", "--workdir=/tmp/b", "--zone=a"], "--zone: has no effect with --on=local"),
        (["--on=gke", "--run=a", "--workdir=gs://b", *GKE, "--nodes=8"], "--nodes: has no effect with --on=gke"),
        (["--on=gke", "--run=a", "--workdir=gs://b", *GKE, "--accelerator=v2-8"], "GKE has no v2"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--accelerator=h100-8", "--nodes=4"], "--nodes: has no effect"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--secret=A=a-$(b)"], "'a-$(b)'"),
        (["cancel", "--on=slurm", "--run=a", "--dry_run"], "--dry_run: has no effect with cancel"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--secret=NOBODY_HAS_THIS"], "NOBODY_HAS_THIS not set"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--env=A"], "--env='A': use NAME=VALUE"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--env=A-B=1"], "'A-B' is not a valid environment variable"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--env=A=1", "--secret=A"], "--env and --secret both set A"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--processes_per=core"], "site.processes_per='core'"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--nodes=0"], "site.nodes=0"),
        (["--on=slurm", "--run=a", "--workdir=/b", "--commit=nothing"], "rev-parse"),
        (["status", "--on=local", "--run=nobody"], "nobody: no run of this name"),
    ],
)  # fmt: skip
def test_submit_rejects_invalid_flags(tmp_path, arguments, words):
    config = [] if arguments[0] in ("status", "cancel") else ["--config=configs/lvm_300m.py"]
    output = run("lvm.submit", *arguments, *config, f"--out={tmp_path}", code=2)
    assert words in output
    assert output.count("\n") == 1, output
