"""Remote backends with fake programs: quoting, management, errors."""

import json
import os
import re
import subprocess
import time

import pytest
import yaml

from tests.commands import run
from tests.fake_programs import Programs

CLOUD = ["--project=my-project", "--zone=us-east5-a"]
GKE = [*CLOUD, "--cluster=pods", "--image=us-docker.pkg.dev/my-project/lvm/lvm"]
CONTEXT = "--context=gke_my-project_us-east5-a_pods"
REQUESTS = {
    "tpu-vm-300m-v4-32": [
        "--on=tpu-vm", "--run=lvm-300m", "--accelerator=v4-32", "--config=configs/lvm_300m.py", *CLOUD,
        "--workdir=gs://bucket/lvm-300m", "--spot", "--secret=WANDB_API_KEY=wandb",
    ],
    "tpu-vm-3b-v5e-256": [
        "--on=tpu-vm", "--run=lvm-3b", "--accelerator=v5litepod-256", "--config=configs/lvm_3b.py", *CLOUD,
        "--workdir=gs://bucket/lvm-3b", "--queued", "--env=LIBTPU_INIT_ARGS=--a=1 --b", "--config.batch_size=512",
    ],
    "gke-3b-2xv5p-128": [
        "--on=gke", "--run=lvm-3b", "--accelerator=v5p-128", "--slices=2", "--config=configs/lvm_3b.py", *GKE,
        "--workdir=gs://bucket/lvm-3b", "--queue=research", "--max_restarts=20",
    ],
    "gke-1b-8x8": [
        "--on=gke", "--run=lvm-1b", "--accelerator=h100-64", "--config=configs/lvm_1b.py", *GKE,
        "--workdir=gs://bucket/lvm-1b", "--spot", "--secret=WANDB_API_KEY",
    ],
    "slurm-1b-8x8": [
        "--on=slurm", "--run=lvm-1b", "--nodes=8", "--gpus_per_node=8", "--config=configs/lvm_1b.py",
        "--workdir=/scratch/lvm-1b", "--partition=gpu", "--account=vision", "--time=2-00:00:00",
        "--setup=source /opt/lvm/bin/activate",
    ],
    "slurm-sweep": [
        "--on=slurm", "--run=sweep", "--accelerator=h200-8", "--config=configs/lvm_100m.py",
        "--workdir=/scratch/sweep", "--processes_per=gpu", "--sweep=optimizer.learning_rate=1e-3,3e-4",
        "--sweep=seed=0,1",
    ],
}  # fmt: skip
SUPERVISED = ["-m", "lvm.submit", "--on=local", "--run=a", "--max_restarts=3"]
HOSTILE = {
    "SPACES": " a  b ",
    "QUOTES": "'\"`echo no`\"'",
    "SHELL": "$(touch /tmp/lvm-was-here) $HOME $$ \\ ; & | > < * ? ~ !",
    "LINES": "one\ntwo\n",
    "KUBERNETES": "$(HOME) $$(HOME) $",
}


def dry_run(out, *arguments):
    """Output and files of a dry run."""
    arguments = [*arguments, f"--out={out}", "--dry_run", "--plan=false", "--commit=HEAD"]
    printed = run("lvm.submit", *arguments)
    names = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tar.gz"))
    return printed, {name: (out / name).read_text() for name in names}


def manifest(out):
    return yaml.safe_load((out / "jobset.yaml").read_text())


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Fakes of the programs of all backends."""
    fakes = Programs(tmp_path / "fakes", "gcloud", "kubectl", "sbatch", "squeue", "sacct", "scancel", "tail")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


# --- Quoting


def job_arguments():
    return ["--config=configs/lvm_300m.py", *(f"--config.tokenizer={value}" for value in HOSTILE.values())]


def hostile():
    return [*job_arguments(), *(f"--env={name}={value}" for name, value in HOSTILE.items())]


def test_slurm_job_quotes_values_and_restarts(tmp_path, programs, monkeypatch):
    workdir = tmp_path / "it's a $(folder)"
    arguments = ["--on=slurm", "--run=a", f"--workdir={workdir}", "--secret=TOKEN", *hostile()]
    dry_run(tmp_path / "out", *arguments)
    script = tmp_path / "out" / "job.sh"
    commit = next((tmp_path / "out").glob("*.tar.gz")).name.removesuffix(".tar.gz")
    (workdir / "launch" / "a" / commit).mkdir(parents=True)
    fakes = Programs(tmp_path / "fakes", "srun", "scontrol", "squeue")
    result = subprocess.run(["bash", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "the secret TOKEN is not in the environment" in result.stderr
    monkeypatch.setenv("TOKEN", "very secret")
    fakes.answer(("srun", 75, ""), ("squeue", 0, "RUNNING\n"))
    result = subprocess.run(["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert result.returncode == 75
    assert fakes.calls[0][:4] == ["srun", "--kill-on-bad-exit=0", "--wait=300", "python"]
    assert fakes.calls[0][4:] == ["-m", "lvm.train", *job_arguments(), f"--workdir={workdir}"]
    assert fakes.calls[2] == ["scontrol", "requeue", "7"]
    assert fakes.environments[0].items() >= {**HOSTILE, "TOKEN": "very secret"}.items()
    fakes.answer(("srun", 65, ""))
    assert subprocess.run(["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"}).returncode == 65
    assert [call[0] for call in fakes.calls[3:]] == ["srun"]
    fakes.answer(("srun", 75, ""), ("squeue", 0, "COMPLETING\n"))  # canceled
    subprocess.run(["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"})
    programs = [call[0] for call in fakes.calls]
    fakes.answer(("srun", 76, ""), ("squeue", 0, "RUNNING\n"))
    for saved in (None, None, None, 50, None, None):
        if saved is not None:
            (workdir / "progress").write_text(f"{saved}\n")
        subprocess.run(["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"})
    # The budget is three: restarted in place, requeued twice, given up; and again after a checkpoint.
    again = ["srun", "srun", "squeue", "scontrol", "srun", "squeue", "scontrol", "srun"]
    assert [call[0] for call in fakes.calls][len(programs) :] == 2 * again
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".gz")
    assert "very secret" not in written


def test_tpu_host_quotes_values_and_supervises(tmp_path, programs):
    arguments = ["--on=tpu-vm", "--run=a", "--accelerator=v4-32", "--workdir=gs://b/a", *CLOUD, *hostile()]
    dry_run(tmp_path / "out", *arguments, "--secret=TOKEN=vault")
    host = tmp_path / "host"
    text = (tmp_path / "out" / "startup.sh").read_text()
    text = text.replace("/opt/lvm", f"{host}/opt").replace("/var/log/lvm.log", f"{host}/log").replace("sleep 10", ":")
    (host / "opt" / "a" / "environment" / "bin").mkdir(parents=True)
    fakes = Programs(tmp_path / "fakes", "gcloud", "curl", "tar")
    Programs(host / "opt" / "bin", "uv")
    fakes.answer(("secrets versions access latest --secret=vault", 0, "very secret\n"))
    # The environment that `uv` would create, with a fake Python.
    python = Programs(host / "opt" / "a" / "environment" / "bin", "python")
    (host / "script.sh").write_text(text.replace("rm -rf code environment && mkdir code", "mkdir code"))
    python.answer(("lvm.submit", 65, ""))
    subprocess.run(["bash", host / "script.sh"], check=True)
    assert len(python.calls) == 1
    assert python.calls[0][1:] == [*SUPERVISED, *job_arguments(), "--workdir=gs://b/a"]
    assert python.environments[0].items() >= {**HOSTILE, "TOKEN": "very secret", "LVM_COORDINATOR": "auto"}.items()
    assert (host / "opt" / "a" / "ended").read_text() == "65\n"
    assert fakes.calls[-1][:3] == ["gcloud", "storage", "cp"]
    assert re.fullmatch(r"gs://b/a/launch/a/ended-.+", fakes.calls[-1][-1])
    subprocess.run(["bash", host / "script.sh"], check=True)  # reboot after the run has ended
    assert len(python.calls) == 1
    assert "very secret" not in (host / "log").read_text() + text


def expanded(text, environment):
    """An argument or value as Kubernetes expands it."""

    def replace(match):
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([-._a-zA-Z0-9]+)\)", replace, text)


def test_pod_quotes_values(tmp_path):
    arguments = ["--on=gke", "--run=a", "--accelerator=v4-32", "--workdir=gs://b/$(HOME)", *GKE, *hostile()]
    dry_run(tmp_path / "out", *arguments)
    job = manifest(tmp_path / "out")["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    home = {"HOME": "/never"}
    assert {item["name"]: expanded(item["value"], home) for item in container["env"]} == HOSTILE
    arguments = [expanded(text, home) for text in container["args"]]
    assert arguments[1:] == [*SUPERVISED, *job_arguments(), "--workdir=gs://b/$(HOME)"]


def test_jobset_rules_tell_final_codes_from_preemption(tmp_path):
    """With messages as Kubernetes writes them for a job that a rule of its pod failure policy ended."""
    dry_run(tmp_path / "out", *REQUESTS["gke-1b-8x8"])
    spec = manifest(tmp_path / "out")["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]

    def action(message):
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]

    exit_codes = "Container lvm for pod default/a-host-0-1 failed with exit code {} matching FailJob rule at index 0"
    assert rules[0]["onExitCodes"] == {"operator": "In", "values": [2, 65, 75]}
    assert action(exit_codes.format(2)) == action(exit_codes.format(65)) == "FailJobSet"
    assert action(exit_codes.format(75)) == "RestartJobSetAndIgnoreMaxRestarts"
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    disrupted = "Pod default/a-host-0-1 has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in spec["failurePolicy"]["rules"])


# --- Management


def submit(tmp_path, name, *more):
    options = [f"--out={tmp_path / 'out'}", "--plan=false", "--commit=HEAD", *more]
    return run("lvm.submit", *REQUESTS[name], *options)


def manage(tmp_path, verb, name, code=0, more=()):
    on, label = REQUESTS[name][:2]
    return run("lvm.submit", verb, on, label, f"--out={tmp_path / 'out'}", "--poll=0.01", *more, code=code)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "slurm-sweep"])
def test_submit_status_logs_cancel_list(tmp_path, programs, name):
    arguments = REQUESTS[name]
    if name.startswith("slurm"):
        programs.answer(("sbatch", 0, "12345\n"))
        assert "12345" in submit(tmp_path, name, f"--workdir={tmp_path / 'work'}")
        assert list((tmp_path / "work" / "launch" / "lvm-1b").glob("*/lvm/train.py"))
        programs.answer(("sacct", 0, "12345 RUNNING"), ("tail", 0, "step 1/2"))
        (tmp_path / "work" / "logs" / "lvm-1b-12345.out").touch()
    else:
        assert "submitted; see `lvm submit status" in submit(tmp_path, name)
        programs.answer(
            ("describe", 0, "state: RUNNING"), ("get jobset,pods", 0, "RUNNING"), ("tail -n", 0, "step 1/2"),
            ("logs", 0, "step 1/2"),
        )  # fmt: skip
    assert "RUNNING" in manage(tmp_path, "status", name)
    assert "step 1/2" in manage(tmp_path, "logs", name)
    manage(tmp_path, "cancel", name)
    on, label = arguments[0].removeprefix("--on="), arguments[1].removeprefix("--run=")
    cancels = {
        "tpu-vm": ["gcloud", "compute", "tpus", "queued-resources", "delete", label, *CLOUD, "--force", "--quiet"],
        "gke": ["kubectl", CONTEXT, "--namespace=default", "delete", "jobset", label],
        "slurm": ["scancel", "--me", f"--name={label}"],
    }  # fmt: skip
    assert programs.calls[-1] == cancels[on]
    manage(tmp_path, "list", name)
    words = {"tpu-vm": "list", "gke": "jobsets,jobs", "slurm": "squeue"}
    assert words[on] in programs.calls[-1]


def test_site_file_is_read_and_flags_override_it(tmp_path, programs):
    (tmp_path / "site.yaml").write_text("project: theirs\nzone: eu-west4-b\n")
    arguments = [
        "--on=tpu-vm",
        "--run=a",
        "--accelerator=v4-32",
        "--workdir=gs://b/a",
        "--config=configs/lvm_300m.py",
    ]
    printed, _ = dry_run(tmp_path / "out", *arguments, f"--site={tmp_path / 'site.yaml'}", "--project=mine")
    assert "--project=mine --zone=eu-west4-b" in printed
    (tmp_path / "site.yaml").write_text("zones: eu-west4-b\n")
    error = run("lvm.submit", *arguments, f"--site={tmp_path / 'site.yaml'}", code=2)
    assert "site.zones: no such key" in error


def test_tpu_vm_watch_recreates_preempted_run(tmp_path, programs):
    submit(tmp_path, "tpu-vm-300m-v4-32")
    none = ("storage cat", 1, "ERROR: The following URLs matched no objects or files")
    state = '{{"state": {{"state": "{}"}}}}'.format
    programs.answer(
        none, none, none, none, none, ("storage cat", 0, "0\n0\n"),
        ("describe", 0, state("PROVISIONING")), ("describe", 1, "no network"), ("describe", 0, state("ACTIVE")),
        ("describe", 0, state("SUSPENDED")), ("describe", 1, "ERROR: NOT_FOUND: no such resource"),
    )  # fmt: skip
    output = manage(tmp_path, "watch", "tpu-vm-300m-v4-32")
    assert "(no network); retrying" in output
    assert "lvm-300m: SUSPENDED; requested again" in output
    assert "lvm-300m: ended with exit code 0; hosts released" in output
    verbs = [call[4] for call in programs.calls if call[3] == "queued-resources"]
    assert [verb for verb in verbs if verb != "describe"] == [
        "create",
        "delete",
        "create",
        "create",
        "delete",
    ]
    creations = [call for call in programs.calls if "create" in call]
    assert creations[0] == creations[1] == creations[2]


def test_tpu_vm_watch_fetches_its_files(tmp_path, programs):
    _, written = dry_run(tmp_path / "there", *REQUESTS["tpu-vm-300m-v4-32"])
    here = tmp_path / "out"
    here.mkdir()
    (here / "create.json").write_text(written["create.json"])  # as `gcloud storage cp` would
    hosts = [("storage cat", 0, codes) for codes in ("1\n", "1\n65\n0\n", "1\n65\n0\n")]  # ending one by one
    programs.answer(*hosts)
    more = [*CLOUD, "--workdir=gs://bucket/lvm-300m"]
    manage(tmp_path, "watch", "tpu-vm-300m-v4-32", 65, more)
    (here / "create.json").unlink()
    programs.answer(("storage cp", 1, "ERROR: (gcloud.storage.cp) The following URLs matched no objects: NOT_FOUND"))
    assert "not found" in manage(tmp_path, "watch", "tpu-vm-300m-v4-32", 2, more)
    assert programs.calls[-1][:4] == [
        "gcloud",
        "storage",
        "cp",
        "gs://bucket/lvm-300m/launch/lvm-300m/startup.sh",
    ]


@pytest.mark.parametrize(("terminal", "code"), [("Completed", 0), ("Failed", 1)])
def test_gke_watch_ends_with_the_run(tmp_path, programs, terminal, code):
    submit(tmp_path, "gke-3b-2xv5p-128")
    programs.answer(
        ("get jobset", 0, '{"status": {"restarts": 1}}'),
        ("get jobset", 0, json.dumps({"status": {"restarts": 2, "terminalState": terminal}})),
    )
    output = manage(tmp_path, "watch", "gke-3b-2xv5p-128", code)
    assert "lvm-3b: running, 1 restarts" in output
    assert f"lvm-3b: {terminal}, 2 restarts" in output


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("COMPLETED\nFAILED", 1), ("CANCELLED by 7", 1)])
def test_slurm_watch_ends_with_the_run(tmp_path, programs, state, code):
    submit(tmp_path, "slurm-1b-8x8", f"--workdir={tmp_path / 'work'}")
    programs.answer(
        ("squeue", 0, "PENDING\n"), ("squeue", 0, "RUNNING\n"), ("squeue", 0, ""), ("sacct", 0, ""),
        ("sacct", 0, state),
    )  # fmt: skip
    output = manage(tmp_path, "watch", "slurm-1b-8x8", code)
    assert output.index("PENDING") < output.index("RUNNING") < output.index("no job named") < output.index(state[:6])


def test_slurm_watch_ignores_earlier_runs_of_the_name(tmp_path, programs):
    submit(tmp_path, "slurm-1b-8x8", f"--workdir={tmp_path / 'work'}")
    submitted = 1_750_000_000
    os.utime(tmp_path / "out" / "submitted.json", (submitted, submitted))
    programs.answer(("squeue", 0, ""), ("sacct", 0, "COMPLETED"))
    manage(tmp_path, "watch", "slurm-1b-8x8")
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(submitted))
    accounted = [call for call in programs.calls if call[0] == "sacct"]
    assert len(accounted) == 2
    assert all(f"--starttime={since}" in call for call in accounted)


def test_slurm_watch_of_unknown_run_is_an_error(tmp_path, programs):
    assert "error: sacct: no job named lvm-1b" in manage(tmp_path, "watch", "slurm-1b-8x8", 2)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Quota 'TPUV4sPerProjectPerZone' exhausted. Limit 0", "the quota"),
        ("ERROR: There is no more capacity in the zone", "no capacity: try --queued"),
        ("ERROR: ALREADY_EXISTS: Resource 'lvm-300m'", "a run of this name exists"),
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", "no permission"),
        ("Please run:\n  $ gcloud auth login\n", "log in first"),
        ("", "failed (no output)"),
    ],
)
def test_submit_explains_failures(tmp_path, programs, output, words):
    programs.answer(("queued-resources create", 1, output))
    options = [f"--out={tmp_path / 'out'}", "--plan=false", "--commit=HEAD"]
    error = run("lvm.submit", *REQUESTS["tpu-vm-300m-v4-32"], *options, code=2)
    assert error.splitlines()[-1].startswith("error: gcloud compute tpus queued-resources: ")
    assert words in error


def test_submit_names_missing_program(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PATH",
        "/usr/bin-without-it:"
        + os.path.dirname(subprocess.run(["which", "git"], capture_output=True, text=True, check=True).stdout),
    )
    output = run("lvm.submit", "status", "--on=slurm", "--run=a", f"--out={tmp_path}", code=2)
    assert "sacct is not installed" in output


# --- Errors


def test_submit_rejects_what_does_not_fit(tmp_path, programs):
    arguments = [
        "--on=slurm",
        "--run=a",
        "--accelerator=h100-1",
        "--config=configs/lvm_7b.py",
        "--commit=HEAD",
    ]
    mesh = [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp")]
    output = run("lvm.submit", *arguments, *mesh, "--workdir=/b", f"--out={tmp_path / 'out'}", code=2)
    assert "planning: " in output
    assert output.splitlines()[-1].startswith("error: ")
    assert "GiB" in output.splitlines()[-1]
    assert programs.calls == []
    assert not (tmp_path / "out").exists()
