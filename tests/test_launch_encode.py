"""Encodings submitted to a backend: golden dry runs, schemas, retries, flags that are refused."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import run
from tests.fake_programs import Programs
from tests.test_launch import CLOUD, GKE
from tests.test_launch_files import GOLDEN

SETTINGS = ["--run=encode", "--workers=500", "--num_shards=5000", "--accelerator=h100-8"]
REQUESTS = {
    "slurm-encode": [
        "encode",
        "--on=slurm",
        *SETTINGS,
        "--parallelism=64",
        "--tokenizer=/scratch/tokenizer",
        "--partition=gpu",
        "--source=/scratch/photos",
        "--out=/scratch/it's a store",
        "--augment=4",
        "--secret=TOKEN",
        "--env=HF_HOME=/scratch/hf cache",
    ],
    "gke-encode": [
        "encode",
        "--on=gke",
        *SETTINGS,
        *GKE,
        "--tokenizer=gs://bucket/tokenizer",
        "--source=gs://bucket/$(photos)",
        "--out=gs://bucket/store",
        "--spot",
        "--max_restarts=5",
    ],
    "tpu-vm-encode": [
        "encode",
        "--on=tpu-vm",
        "--run=encode",
        "--num_shards=5000",
        *CLOUD,
        "--accelerator=v5litepod-64",
        "--slices=2",
        "--tokenizer=gs://bucket/tokenizer",
        "--source=gs://bucket/it's photos",
        "--out=gs://bucket/store",
        "--spot",
    ],
}
LOCAL = ["encode", "--on=local", "--run=encode", "--tokenizer=t", "--source=it's a folder", "--out=store"]  # fmt: skip


def dry_run(out, name, *more):
    printed = run(
        "lvm.submit", *REQUESTS[name], f"--folder={out}", "--dry_run", "--check=false", "--commit=HEAD", *more
    )
    written = {path.name: path.read_text() for path in sorted(out.iterdir()) if path.suffix != ".gz"}
    return printed, written


@pytest.mark.parametrize("name", REQUESTS)
def test_encode_dry_run_golden(tmp_path, name):
    printed, written = dry_run(tmp_path / "out", name)
    commit = next((tmp_path / "out").glob("*.tar.gz")).name.removesuffix(".tar.gz")
    text = "".join(f"=== {name}\n{content}" for name, content in {"commands": printed, **written}.items())
    text = text.replace(commit, "COMMIT").replace(str(tmp_path), "/FOLDER")
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / f"{name}.txt").write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text()


def test_encode_job_is_valid_kubernetes(tmp_path):
    import kubernetes_validate

    _, written = dry_run(tmp_path / "out", "gke-encode")
    job = yaml.safe_load(written["job.yaml"])
    assert job["kind"] == "Job"
    kubernetes_validate.validate(job, "1.33", strict=True)
    job["spec"]["completionMod"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionMod"):
        kubernetes_validate.validate(job, "1.33", strict=True)


@pytest.mark.parametrize("name", ["slurm-encode", "tpu-vm-encode"])
def test_encode_scripts_pass_shellcheck(tmp_path, name):
    dry_run(tmp_path / "out", name)
    for script in (tmp_path / "out").glob("*.sh"):
        shellcheck = Path(sys.executable).parent / "shellcheck"
        result = subprocess.run([shellcheck, "--severity=style", script], capture_output=True, text=True)
        assert not set(re.findall(r"SC\d+", result.stdout)), result.stdout


def test_slurm_task_is_requeued_within_its_budget(tmp_path, monkeypatch):
    store = tmp_path / "store"
    _, written = dry_run(tmp_path / "out", "slurm-encode", f"--out={store}", "--max_restarts=2")
    commit = next((tmp_path / "out").glob("*.tar.gz")).name.removesuffix(".tar.gz")
    (tmp_path / "store.encode" / "launch" / "encode" / commit).mkdir(parents=True)
    fakes = Programs(tmp_path / "fakes", "python", "squeue", "scontrol")
    monkeypatch.setenv("PATH", fakes.path)
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "41", "TOKEN": "very secret"}
    fakes.answer(("tokenizer.encode", 1, ""), ("squeue", 0, "RUNNING\n"))
    for _ in range(3):
        assert subprocess.run(["bash", tmp_path / "out" / "job.sh"], env=environment).returncode == 1
    assert fakes.calls[0][1:3] == ["-m", "tokenizer.encode"]
    assert fakes.calls[0][-1] == "--shard=41/500"
    requeues = [call for call in fakes.calls if call[0] == "scontrol"]
    assert requeues == [["scontrol", "requeue", "7_41"]] * 2
    assert "very secret" not in "".join(written.values())


def test_tpu_host_encodes_under_a_supervisor(tmp_path):
    _, written = dry_run(tmp_path / "out", "tpu-vm-encode")
    (line,) = [line for line in written["startup.sh"].splitlines() if " -m lvm.submit " in line]
    supervised = shlex.split(line)[1:]
    assert supervised[:6] == ["-m", "lvm.submit", "encode", "--on=local", "--run=encode", "--max_restarts=3"]
    assert "export LVM_COORDINATOR=auto" in written["startup.sh"]
    printed = run("lvm.submit", *supervised[2:], "--dry_run")
    expected = ["--tokenizer=gs://bucket/tokenizer", "--source=gs://bucket/it's photos", "--out=gs://bucket/store"]
    command = shlex.split(printed.splitlines()[1])[1:]
    assert command == ["-m", "tokenizer.encode", *expected, "--num_shards=5000"]
    _, written = dry_run(tmp_path / "out", "tpu-vm-encode", "--max_restarts=0", "--source=s3://bucket/photos")
    assert "python -m tokenizer.encode --tokenizer=" in written["startup.sh"]


def test_tpu_vm_encode_is_watched_and_canceled(tmp_path, monkeypatch):
    fakes = Programs(tmp_path / "fakes", "gcloud")
    monkeypatch.setenv("PATH", fakes.path)
    run("lvm.submit", *REQUESTS["tpu-vm-encode"], f"--folder={tmp_path / 'out'}", "--check=false", "--commit=HEAD")
    create = next(call for call in fakes.calls if "create" in call)
    assert {"--node-count=2", "--node-prefix=encode", "--spot"} <= {*create}
    fakes.answer(
        ("storage cat", 1, "ERROR: The following URLs matched no objects or files"), ("storage cat", 0, "0\n0\n"),
        ("describe", 0, '{"state": {"state": "SUSPENDED"}}'),
    )  # fmt: skip
    verb = ["--on=tpu-vm", "--run=encode", f"--out={tmp_path / 'out'}", "--poll=0.01"]
    assert "SUSPENDED; requested again" in run("lvm.submit", "watch", *verb)
    assert fakes.calls.count(create) == 2
    run("lvm.submit", "cancel", *verb)
    assert "delete" in fakes.calls[-1]


@pytest.mark.parametrize(("condition", "code"), [("Complete", 0), ("Failed", 1)])
def test_encode_job_is_managed(tmp_path, monkeypatch, condition, code):
    fakes = Programs(tmp_path / "fakes", "gcloud", "kubectl")
    monkeypatch.setenv("PATH", fakes.path)
    run("lvm.submit", *REQUESTS["gke-encode"], f"--folder={tmp_path / 'out'}", "--check=false", "--commit=HEAD")
    status = {"conditions": [{"type": condition, "status": "True"}], "succeeded": 499}
    fakes.answer(("get job", 0, json.dumps({"status": status})))
    verb = ["--on=gke", "--run=encode", f"--out={tmp_path / 'out'}", "--poll=0.01"]
    assert "499 succeeded" in run("lvm.submit", "watch", *verb, code=code)
    run("lvm.submit", "cancel", *verb)
    assert fakes.calls[-1][-3:] == ["delete", "job", "encode"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batchsize=3"], "batchsize"),
        (["--num_shards=400"], "--num_shards=400: less than --workers=500"),
        (["--accelerator=h100-64"], "8 nodes: a worker is one node"),
        (["--check=true", "--tokenizer=/nowhere"], "/nowhere"),
        (["--processes=2"], "--processes: has no effect with --on=slurm"),
        (["--slices=2"], "--slices: has no effect with --on=slurm"),
    ],
)
def test_encode_is_refused_before_submission(tmp_path, more, words):
    arguments = [*REQUESTS["slurm-encode"], f"--folder={tmp_path / 'out'}", "--check=false", "--commit=HEAD", *more]
    assert words in run("lvm.submit", *arguments, "--dry_run", code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*LOCAL, "--workers=3"], "--workers: has no effect with --on=local"),
        ([*LOCAL, "--check=false"], "--check: has no effect with --on=local"),
        ([*LOCAL, "--accelerator=h100-8"], "--accelerator: has no effect with --on=local"),
        ([*LOCAL, "--site=site.yaml"], "--site: has no effect with --on=local"),
        ([*LOCAL, "--source="], "--source: required"),
        ([*REQUESTS["tpu-vm-encode"], "--workers=3"], "--workers: has no effect with --on=tpu-vm"),
        ([*REQUESTS["tpu-vm-encode"], "--out=/scratch/store"], "--out=/scratch/store: hosts share no disk; use gs://"),
        ([*REQUESTS["tpu-vm-encode"], "--out=s3://b/store"], "--out=s3://b/store: hosts share no disk; use gs://"),
        ([*REQUESTS["tpu-vm-encode"], "--source=/photos"], "--source=/photos: hosts share no disk; use gs://"),
        ([*REQUESTS["tpu-vm-encode"], "--reserved"], "--spot, --reserved: use one of them"),
        ([*REQUESTS["tpu-vm-encode"], "--accelerator=h100-8", "--check=false"], "use a TPU slice"),
    ],
)
def test_encode_without_scheduler_rejects_flags(tmp_path, arguments, words):
    assert words in run("lvm.submit", *arguments, f"--folder={tmp_path / 'out'}", "--dry_run", code=2)
