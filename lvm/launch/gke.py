"""GKE backend: a run is a JobSet of TPU slices or GPU hosts."""

import json
from typing import Any

import yaml

from lvm.common import distributed, errors
from lvm.common.errors import UserError
from lvm.launch import shell
from lvm.launch.requests import ArrayRequest, ClusterConfig, Request, SubmittedRun
from lvm.launch.shell import Command

MANIFEST, ARRAY_MANIFEST = "jobset.yaml", "job.yaml"
_INDEX = "TASK_INDEX"  # variable
_LABEL = "lvm-run"
_PORT = 8476
_GRACE = 300  # seconds from SIGTERM to SIGKILL: enough to save a checkpoint
_FINAL = tuple(code for code in errors.FINAL if code != errors.EXIT_DONE)
_GPU_LABELS = {
    "a100-40gb": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}  # cloud.google.com/kubernetes-engine/docs/concepts/gpus


def validate(request: Request) -> None:
    """Raises UserError for a request that GKE cannot run."""
    request.site.require("project", "zone", "cluster", "image")
    request.require_gcs_workdir()
    if request.capacity == "reserved":
        raise UserError("--reserved: on GKE, reservations belong to node pools; omit the flag")
    if request.capacity == "queued" and not request.site.queue:
        raise UserError("--queued: on GKE, Kueue queues; set --queue")
    accelerator, generation = request.hardware.accelerator, request.hardware.generation
    if accelerator.pod is not None and not accelerator.pod.gke_accelerator:
        raise UserError(f"--accelerator: GKE has no {generation}")
    if accelerator.platform == "gpu":
        if request.slices > 1:
            raise UserError("--slices: for TPUs; give the number of GPUs, as in --accelerator=h100-64")
        if generation not in _GPU_LABELS:
            raise UserError(f"--accelerator: GKE has no {generation}; use one of {', '.join(_GPU_LABELS)}")

    if isinstance(request, ArrayRequest) and request.hardware.hosts > 1:
        raise UserError(
            f"--accelerator={request.hardware.name}: {request.hardware.hosts} hosts; a worker is one host, such as "
            "v5litepod-8 or h100-8, and --workers is their number"
        )


def files(request: Request) -> dict[str, str]:
    if isinstance(request, ArrayRequest):
        return {ARRAY_MANIFEST: yaml.safe_dump(array_manifest(request), sort_keys=False)}
    return {MANIFEST: yaml.safe_dump(manifest(request), sort_keys=False)}


def submit(request: Request) -> list[Command]:
    site = request.site
    location = [f"--project={site.project}", f"--location={site.zone}"]
    return [
        ["gcloud", "storage", "cp", f"{request.commit}.tar.gz", request.archive],
        ["gcloud", "container", "clusters", "get-credentials", site.cluster, *location],
        [*_kubectl(site), "create", f"--filename={next(iter(files(request)))}"],
    ]


def status(run: SubmittedRun) -> Command:
    return [*_kubectl(run.site), "get", f"{_kind(run)},pods", f"--selector={_LABEL}={run.name}", "--output=wide"]


def logs(run: SubmittedRun) -> Command:
    options = ["--prefix", "--tail=200", "--max-log-requests=1000"]
    return [*_kubectl(run.site), "logs", f"--selector={_LABEL}={run.name}", *options]


def cancel(run: SubmittedRun) -> Command:
    return [*_kubectl(run.site), "delete", _kind(run), run.name]


def list_runs(run: SubmittedRun) -> Command:
    return [*_kubectl(run.site), "get", "jobsets,jobs", f"--selector={_LABEL}", "--output=wide"]


def _kind(run: SubmittedRun) -> str:
    return "job" if run.store or run.sweep else "jobset"


def watch(run: SubmittedRun, poll: float) -> int:
    """Logs the run's state until it has ended; the cluster restarts it. Returns 0 if it completed, 1 if it failed."""
    if _kind(run) == "job":
        return _watch_job(run, poll)
    command = [*_kubectl(run.site), "get", "jobset", run.name, "--output=json"]

    def check() -> tuple[str, int | None]:
        jobset = json.loads(shell.run(command, run.folder, quiet=True)).get("status", {})
        terminal = jobset.get("terminalState")
        code = (0 if terminal == "Completed" else 1) if terminal else None
        return f"{terminal or 'running'}, {jobset.get('restarts', 0)} restarts", code

    return shell.watch(run.name, check, poll)


def _watch_job(run: SubmittedRun, poll: float) -> int:
    command = [*_kubectl(run.site), "get", "job", run.name, "--output=json"]

    def check() -> tuple[str, int | None]:
        status = json.loads(shell.run(command, run.folder, quiet=True)).get("status", {})
        ended = [item["type"] for item in status.get("conditions", ()) if item["status"] == "True"]
        code = 0 if "Complete" in ended else 1 if "Failed" in ended else None
        counts = ", ".join(f"{status.get(key, 0)} {key}" for key in ("active", "succeeded", "failed"))
        return f"{ {0: 'complete', 1: 'failed', None: 'running'}[code] }; pods: {counts}", code

    return shell.watch(run.name, check, poll)


def array_manifest(request: ArrayRequest) -> dict[str, Any]:
    """The Indexed Job, `batch/v1`: an index is a task, which the next free pod takes."""
    metadata = _metadata(request)
    pod = _pod(request)
    (container,) = pod["containers"]
    container["args"].append(request.index_argument(f"$({_INDEX})"))
    container["env"].append(_from_index(_INDEX))
    ignored = [{"type": "DisruptionTarget", "status": "True"}]  # preempted or drained: not counted as a failure
    spec = {
        "completions": request.workers,
        "parallelism": request.parallelism,
        "completionMode": "Indexed",
        "backoffLimitPerIndex": request.max_restarts,
        "maxFailedIndexes": max(1, request.workers // 10),
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": ignored},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [*_FINAL]}},
            ]
        },
        "template": {"metadata": {"labels": {_LABEL: request.name}}, "spec": pod},
    }
    if request.site.queue:
        spec["suspend"] = True  # until Kueue admits it
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _metadata(request: Request) -> dict[str, Any]:
    labels: dict[str, str] = {_LABEL: request.name}
    if request.site.queue:
        labels["kueue.x-k8s.io/queue-name"] = request.site.queue
    return {"name": request.name, "namespace": request.site.namespace, "labels": labels}


def manifest(request: Request) -> dict[str, Any]:
    """The JobSet, `jobset.x-k8s.io/v1alpha2`."""
    metadata = _metadata(request)
    if request.hardware.accelerator.platform == "tpu":
        # Each job has a slice to itself.
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    job = {"name": "host", "replicas": request.slices, "template": {"spec": _job(request)}}
    # Rules see the reason and the message of a failed job, which names the exit code; the first that matches counts.
    final = f"exit code ({'|'.join(map(str, _FINAL))}) "
    rules = [
        {
            "name": "final",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [final],
        },
        {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        },
    ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"failurePolicy": {"maxRestarts": request.max_restarts, "rules": rules}, "replicatedJobs": [job]},
    }


def _job(request: Request) -> dict[str, Any]:
    codes = {"operator": "In", "values": [*_FINAL, errors.EXIT_PREEMPTED]}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]  # the node was preempted, drained or lost
    return {
        "parallelism": request.hardware.hosts,
        "completions": request.hardware.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": codes},
                {"action": "FailJob", "onPodConditions": disrupted},
            ]
        },
        "template": {"metadata": {"labels": {_LABEL: request.name}}, "spec": _pod(request)},
    }


def _pod(request: Request) -> dict[str, Any]:
    site, slice_ = request.site, request.hardware
    tpu = slice_.accelerator.platform == "tpu"
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    selector = {}
    if tpu and slice_.accelerator.pod:
        selector["cloud.google.com/gke-tpu-accelerator"] = slice_.accelerator.pod.gke_accelerator
        selector["cloud.google.com/gke-tpu-topology"] = slice_.topology
    else:
        selector["cloud.google.com/gke-accelerator"] = _GPU_LABELS[slice_.generation]
    if request.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE,
        "nodeSelector": selector,
        "tolerations": [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(request, resource)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if tpu:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if site.service_account:
        pod["serviceAccountName"] = site.service_account
    return pod


def _container(request: Request, resource: str) -> dict[str, Any]:
    # A job repeats its failed indexes by itself.
    command = request.command if isinstance(request, ArrayRequest) else request.supervised_command
    variables: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in request.environment.items()
    ]
    variables += [_secret(name, source) for name, source in request.secrets.items()]
    if request.hardware.accelerator.platform == "gpu" and request.hardware.hosts > 1:
        # By these the hosts join: JobSet names every pod, and the job indexes them.
        variables += [
            {"name": distributed.COORDINATOR, "value": f"{request.name}-host-0-0.{request.name}:{_PORT}"},
            {"name": distributed.NUM_PROCESSES, "value": str(request.hardware.hosts)},
            _from_index(distributed.PROCESS_ID),
        ]
    return {
        "name": "lvm",
        "image": request.site.image,
        # The entry point of the image, lvm/launch/start.py, fetches the code and runs `python` with the rest.
        "args": [_literal(text) for text in (request.archive, *command)],
        "env": variables,
        "resources": {"limits": {resource: request.hardware.chips_per_host}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def _from_index(name: str) -> dict[str, Any]:
    """Variable with the index of the pod in its job."""
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _secret(name: str, source: str) -> dict[str, Any]:
    """Variable from the Kubernetes secret `SECRET` or `SECRET/KEY`; the key defaults to the variable's name."""
    secret, _, key = source.partition("/")
    if not key:
        secret, key = secret.lower().replace("_", "-"), name
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _literal(text: str) -> str:
    """Escapes `$`: Kubernetes expands `$(NAME)` in arguments and values."""
    return text.replace("$", "$$")


def _kubectl(site: ClusterConfig) -> list[str]:
    site.require("project", "zone", "cluster")
    return ["kubectl", f"--context=gke_{site.project}_{site.zone}_{site.cluster}", f"--namespace={site.namespace}"]
