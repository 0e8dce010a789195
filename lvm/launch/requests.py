"""Run requests and cluster settings, validated before anything is submitted."""

import abc
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_positive
from lvm.hardware.accelerators import Slice

CAPACITIES = ("on-demand", "spot", "reserved", "queued")
_RUN_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _setting(default: Any, help: str, *backends: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "backends": backends})


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Settings of a cluster: the keys of a `--site` file (YAML), each also a flag. "" takes the backend's default."""

    project: str = _setting("", "Google Cloud project", "tpu-vm", "gke")
    zone: str = _setting("", "Google Cloud zone", "tpu-vm", "gke")
    cluster: str = _setting("", "GKE cluster", "gke")
    namespace: str = _setting("default", "GKE namespace", "gke")
    image: str = _setting("", "container image on GKE (`Dockerfile` builds one)", "gke")
    queue: str = _setting("", "Kueue queue", "gke")
    runtime_version: str = _setting("", "TPU VM runtime version", "tpu-vm")
    service_account: str = _setting("", "service account of TPU VMs or pods", "tpu-vm", "gke")
    nodes: int = _setting(1, "Slurm nodes", "slurm")
    gpus_per_node: int = _setting(8, "GPUs per Slurm node", "slurm")
    partition: str = _setting("", "Slurm partition", "slurm")
    account: str = _setting("", "Slurm account", "slurm")
    time: str = _setting("", "Slurm time limit, such as 2-00:00:00", "slurm")
    processes_per: str = _setting("node", "one process per node or per gpu, under Slurm", "slurm")
    setup: str = _setting("", "shell line that each Slurm job runs first, to put Python on the path", "slurm")

    def __post_init__(self) -> None:
        check_positive(self, "nodes", "gpus_per_node")
        check_choice(self, "processes_per", ("node", "gpu"))

    @classmethod
    def keys_of(cls, backend: str) -> list[str]:
        """Settings that a backend uses."""
        return [field.name for field in dataclasses.fields(cls) if backend in field.metadata["backends"]]

    def require(self, *names: str) -> None:
        """Raises UserError unless these are set."""
        missing = ", ".join(f"--{name}" for name in names if not getattr(self, name))
        if missing:
            raise UserError(f"{missing}: required, as a flag or in the --site file")


def read_cluster_config(path: epath.PathLike | None, overrides: Mapping[str, Any]) -> ClusterConfig:
    """Settings of a YAML file, with `overrides`.

    Raises:
      UserError: the file is missing or not YAML, or a key is unknown.
    """
    values: Any = {}
    if path:
        try:
            values = yaml.safe_load(epath.Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise UserError(f"--site={path} is not YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise UserError(f"--site={path} cannot be read: {error.strerror or error}") from error
        if not isinstance(values, dict):
            raise UserError(f"--site={path} is not a mapping of keys to values")
    return from_config_dict(ClusterConfig, {**values, **overrides}, "site")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run by name.

    Attributes:
      name: a DNS label of up to 40 characters, which resources, manifests and logs are named after.
      workdir: directory of the run; `gs://…` in the cloud.
      site: the cluster.
    """

    name: str
    workdir: str
    site: ClusterConfig = ClusterConfig()

    @property
    def launch_folder(self) -> str:
        """Folder in the workdir with the code archive and the submitted files."""
        if not self.workdir:
            raise UserError("--workdir: required; it has the files of the run")
        return f"{self.workdir.rstrip('/')}/launch/{self.name}"


@dataclasses.dataclass(frozen=True)
class SubmittedRun(Run):
    """A run that was submitted, or all runs of a site if the name is "".

    Attributes:
      folder: its files on this machine.
      store: the store that it encodes; "" for training.
      sweep: the folder of the sweep that it trains; "" for a single run.
      since: local time of its submission, in ISO format; "" if it is unknown.
    """

    folder: Path = Path()
    store: str = ""
    sweep: str = ""
    since: str = ""


@dataclasses.dataclass(frozen=True)
class Request(Run):
    """A run to submit.

    Attributes:
      train_arguments: arguments of `lvm.train` besides the workdir.
      commit: Git revision of the code.
      slice: the accelerators; None for this machine.
      capacity: one of `CAPACITIES`.
      secrets: variable → name of the secret that holds its value; the value is not read here.
      max_restarts: restart budget: failures (exit code 1, 76, 77, a signal) without a new checkpoint in between after
        which the run is restarted. 75 (preempted) is not counted; 0 never restarts.
      sweep: arguments of each run of a sweep, besides `train_arguments`; () is a single run.

    Raises:
      UserError: an invalid name or value.
    """

    train_arguments: tuple[str, ...] = ()
    commit: str = ""
    slice: Slice | None = None
    slices: int = 1
    capacity: str = "on-demand"
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_restarts: int = 3
    sweep: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        check_run_name(self.name)
        for name in (*self.environment, *self.secrets):
            if not VARIABLE.fullmatch(name):
                raise UserError(f"{name!r} is not a valid environment variable; use letters, digits and _")
        if twice := set(self.environment) & set(self.secrets):
            raise UserError(f"--env and --secret both set {', '.join(sorted(twice))}")

    @property
    def hardware(self) -> Slice:
        """`slice`; raises UserError if it is not set."""
        if self.slice is None:
            raise UserError("--accelerator: required, TPUs such as v5litepod-256 or GPUs such as h100-64")
        return self.slice

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of `python` in each process."""
        return ("-m", "lvm.train", *self.train_arguments, f"--workdir={self.workdir}")

    @property
    def supervised_command(self) -> tuple[str, ...]:
        """Arguments of `python` on each host: `command` under the local backend's supervisor, which restarts it."""
        if not self.max_restarts:
            return self.command
        return ("-m", "lvm.submit", *self._supervisor, *self.train_arguments, f"--workdir={self.workdir}")

    @property
    def _supervisor(self) -> tuple[str, ...]:
        return ("--on=local", f"--run={self.name}", f"--max_restarts={self.max_restarts}")

    @property
    def archive(self) -> str:
        """Path of the code archive."""
        return f"{self.launch_folder}/{self.commit}.tar.gz"

    def require_gcs_workdir(self) -> None:
        """Raises UserError unless the workdir is on Google Cloud Storage."""
        if not self.workdir.startswith("gs://"):
            raise UserError(f"--workdir={self.workdir}: hosts share no disk; use gs://…")


@dataclasses.dataclass(frozen=True)
class ArrayRequest(Request, abc.ABC):
    """Tasks of a scheduler, which differ by their index alone and may be repeated.

    Attributes:
      workers: number of tasks, each on one host.
      parallelism: tasks at a time.
    """

    workers: int = 1
    parallelism: int = 1

    @abc.abstractmethod
    def index_argument(self, index: str) -> str:
        """The argument with which `command` does the task of an index, or of a variable that holds it."""


@dataclasses.dataclass(frozen=True)
class EncodeRequest(ArrayRequest):
    """An encoding to submit.

    Either tasks of a scheduler, each of which encodes one group of the store's shards, or processes that claim shards.

    Attributes:
      encode_arguments: arguments of `tokenizer.encode` besides the group.
      store: the store.
    """

    encode_arguments: tuple[str, ...] = ()
    store: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of `python` in each process, without the group."""
        return ("-m", "tokenizer.encode", *self.encode_arguments)

    @property
    def supervised_command(self) -> tuple[str, ...]:
        """As of `Request`, where no scheduler repeats what fails."""
        if not self.max_restarts:
            return self.command
        return ("-m", "lvm.submit", "encode", *self._supervisor, *self.encode_arguments)

    def index_argument(self, index: str) -> str:
        return f"--shard={index}/{self.workers}"


@dataclasses.dataclass(frozen=True)
class SweepRequest(ArrayRequest):
    """A sweep to submit: tasks of a scheduler, each of which trains a run and those that branch off it.

    Attributes:
      folder: of the sweep.
    """

    folder: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of `python` in each task, without its index."""
        return ("-m", "lvm.sweep", "run", f"--sweep={self.folder}", f"--max_restarts={self.max_restarts}")

    def index_argument(self, index: str) -> str:
        return f"--index={index}"


def check_run_name(name: str) -> None:
    """Raises UserError unless it is a valid run name."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"--run={name!r} is not a valid name; use up to 40 lower-case letters, digits and hyphens, a letter first "
            "and no hyphen last"
        )


def parse_pairs(flag: str, values: Sequence[str], default_to_name: bool = False) -> dict[str, str]:
    """`["A=1"]` → `{"A": "1"}`; with `default_to_name`, "A" alone is `{"A": "A"}`.

    Raises:
      UserError: a value without "=", or a name given twice.
    """
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals and not default_to_name:
            raise UserError(f"--{flag}={text!r}: use NAME=VALUE")
        if name in pairs:
            raise UserError(f"--{flag}: {name} is given twice")
        pairs[name] = value if equals else name
    return pairs


def parse_sweep(axes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """`["optimizer.learning_rate=1e-3,3e-4", "seed=0,1"]` → the arguments of each of its four runs.

    Raises:
      UserError: an axis without values.
    """
    options = []
    for text in axes:
        key, _, values = text.partition("=")
        if not key or "" in values.split(","):
            raise UserError(f"--sweep={text!r}: use KEY=VALUE,VALUE")
        options.append([f"--config.{key.removeprefix('config.')}={value}" for value in values.split(",")])
    return tuple(itertools.product(*options)) if options else ()
