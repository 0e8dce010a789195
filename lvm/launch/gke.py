"""Runs on GKE: a JobSet, of TPU slices or of hosts of GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from lvm.common import distributed, errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import shell
from lvm.launch.request import ClusterConfig, Request, Submitted
from lvm.launch.shell import Command

SITE_KEYS = ("project", "zone", "cluster", "namespace", "image", "queue", "service_account")
MANIFEST = "jobset.yaml"
_LABEL = "lvm-run"
_PORT = 8476
_GRACE = 300  # seconds between SIGTERM and the end: enough to save
_GPU_LABELS = {
    "a100-40gb": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}  # cloud.google.com/kubernetes-engine/docs/concepts/gpus


def check(request: Request) -> None:
    """Raises UserError for what a cluster can't run."""
    request.site.need("project", "zone", "cluster", "image")
    if request.slice is None:
        raise UserError(
            "--accelerator: not given; wanted TPUs such as v5litepod-256, or GPUs such as h100-64"
        )
    if not request.workdir.startswith("gs://"):
        raise UserError(f"--workdir: {request.workdir}: pods share nothing but storage; wanted gs://…")
    if request.capacity == "reserved":
        raise UserError(
            "--reserved: on GKE it is the node pool that belongs to a reservation; leave this out"
        )
    if request.capacity == "queued" and not request.site.queue:
        raise UserError("--queued: on GKE it is Kueue that queues; name its --queue")
    pod = request.slice.accelerator.pod
    if pod is not None and not pod.gke_accelerator:
        raise UserError(f"--accelerator: GKE has no {request.slice.generation}")
    if request.slice.accelerator.platform == "gpu":
        if request.slices > 1:
            raise UserError("--slices: GPUs have none; give --accelerator all of them, such as h100-64")
        if request.slice.generation not in _GPU_LABELS:
            raise UserError(
                f"--accelerator: GKE has no {request.slice.generation}; it has {', '.join(_GPU_LABELS)}"
            )


def files(request: Request) -> dict[str, str]:
    """The manifest."""
    return {MANIFEST: yaml.safe_dump(manifest(request), sort_keys=False)}


def submit(request: Request) -> list[Command]:
    """What creates the run, in the folder of its files."""
    site = request.site
    return [
        ["gcloud", "storage", "cp", f"{request.commit}.tar.gz", request.archive],
        _credentials(site),
        [*_kubectl(site), "create", f"--filename={MANIFEST}"],
    ]


def status(run: Submitted) -> Command:
    return [*_kubectl(run.site), "get", "jobset,pods", f"--selector={_LABEL}={run.run}", "--output=wide"]


def logs(run: Submitted) -> Command:
    lines = ["--prefix", "--tail=200", "--max-log-requests=1000"]
    return [*_kubectl(run.site), "logs", f"--selector={_LABEL}={run.run}", *lines]


def cancel(run: Submitted) -> Command:
    return [*_kubectl(run.site), "delete", "jobset", run.run]


def listing(run: Submitted) -> Command:
    return [*_kubectl(run.site), "get", "jobsets", f"--selector={_LABEL}", "--output=wide"]


def watch(run: Submitted, poll: float) -> int:
    """Says what becomes of the run until it has ended; the cluster itself starts it again.

    Returns:
      0 where it completed, 1 where it failed.
    """
    state = [*_kubectl(run.site), "get", "jobset", run.run, "--output=json"]
    shown = ""

    def look() -> int | None:
        nonlocal shown
        found = json.loads(shell.run(state, run.folder, quiet=True)).get("status", {})
        now = f"{found.get('terminalState') or 'running'}, {found.get('restarts', 0)} restarts"
        if now != shown:
            log_info(f"{run.run}: {now}")
        shown = now
        if found.get("terminalState"):
            return 0 if found["terminalState"] == "Completed" else 1
        return None

    return shell.watch(look, poll)


def manifest(request: Request) -> dict[str, Any]:
    """The JobSet (`jobset.x-k8s.io/v1alpha2`) of a request."""
    assert request.slice is not None
    metadata: dict[str, Any] = {
        "name": request.run,
        "namespace": request.site.namespace,
        "labels": {_LABEL: request.run},
    }
    if request.site.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = request.site.queue
    if request.slice.accelerator.platform == "tpu":
        # One slice a job, and no two jobs on one slice.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    never = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"], "name": "not-again"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": request.max_restarts, "rules": [never]},
            "replicatedJobs": [
                {"name": "host", "replicas": request.slices, "template": {"spec": _job(request)}}
            ],
        },
    }


def _job(request: Request) -> dict[str, Any]:
    assert request.slice is not None
    bad = [errors.EXIT_BAD_INPUT, errors.EXIT_DIVERGED]
    return {
        "parallelism": request.slice.hosts,
        "completions": request.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": bad}}]
        },
        "template": {"metadata": {"labels": {_LABEL: request.run}}, "spec": _pod(request)},
    }


def _pod(request: Request) -> dict[str, Any]:
    assert request.slice is not None
    site, slice_ = request.site, request.slice
    tpu = slice_.accelerator.platform == "tpu"
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    selector = {}
    if tpu and slice_.accelerator.pod:
        selector["cloud.google.com/gke-tpu-accelerator"] = slice_.accelerator.pod.gke_accelerator
        selector["cloud.google.com/gke-tpu-topology"] = slice_.topology
    else:
        selector["cloud.google.com/gke-accelerator"] = _GPU_LABELS[slice_.generation]
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if request.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(request, resource)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if tpu:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if site.service_account:
        pod["serviceAccountName"] = site.service_account
    return pod


def _container(request: Request, resource: str) -> dict[str, Any]:
    assert request.slice is not None
    variables: list[Mapping[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in request.environment.items()
    ]
    variables += [_secret(name, where) for name, where in request.secrets.items()]
    if request.slice.accelerator.platform == "gpu":
        variables += _ranks(request)
    return {
        "name": "lvm",
        "image": request.site.image,
        # The image's entry point fetches the code and runs Python on the rest.
        "args": [_literal(text) for text in (request.archive, *request.command)],
        "env": variables,
        "resources": {"limits": {resource: request.slice.chips_per_host}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def _ranks(request: Request) -> list[dict[str, Any]]:
    """How GPU hosts find each other: JobSet gives every pod a name, and the job numbers them."""
    assert request.slice is not None
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    if request.slice.hosts == 1:
        return []
    return [
        {"name": distributed.COORDINATOR, "value": f"{request.run}-host-0-0.{request.run}:{_PORT}"},
        {"name": distributed.NUM_PROCESSES, "value": str(request.slice.hosts)},
        {"name": distributed.PROCESS_ID, "valueFrom": index},
    ]


def _secret(name: str, where: str) -> Mapping[str, Any]:
    """`SECRET` or `SECRET/KEY` of the namespace; the key is the variable's name if it isn't said."""
    secret, _, key = where.partition("/")
    if not key:
        secret, key = secret.lower().replace("_", "-"), name
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _literal(text: str) -> str:
    """Kubernetes replaces `$(NAME)` in arguments and values, and takes `$$` for a dollar sign."""
    return text.replace("$", "$$")


def _credentials(site: ClusterConfig) -> Command:
    return [
        "gcloud", "container", "clusters", "get-credentials", site.cluster,
        f"--project={site.project}", f"--location={site.zone}",
    ]  # fmt: skip


def _kubectl(site: ClusterConfig) -> list[str]:
    site.need("project", "zone", "cluster")
    return [
        "kubectl",
        f"--context=gke_{site.project}_{site.zone}_{site.cluster}",
        f"--namespace={site.namespace}",
    ]
