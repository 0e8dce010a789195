"""What is asked for when a run is submitted, checked before anything is sent anywhere."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from lvm.common.errors import UserError
from lvm.hardware.accelerators import Slice

CAPACITIES = ("on-demand", "spot", "reserved", "queued")
_RUN = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Where runs go, apart from what a run is: the same keys as flags and in a `--site` file (YAML).

    Attributes:
      project, zone: of Google Cloud.
      cluster, namespace: of GKE.
      image: the container on GKE (`Dockerfile` makes one).
      queue: the Kueue queue that a manifest names; "" for none.
      runtime_version: of TPU VMs; "" is the usual one of the generation.
      service_account: that TPU VMs or pods run as; "" is the default one.
      nodes, gpus_per_node: of a run on GPUs.
      partition, account, time: of Slurm; "" leaves them to its defaults.
      processes_per: "node" or "gpu": what each process of a Slurm job drives.
      setup: a line of shell that a Slurm job runs first, on each node, to have Python and its packages on the path.
    """

    project: str = ""
    zone: str = ""
    cluster: str = ""
    namespace: str = "default"
    image: str = ""
    queue: str = ""
    runtime_version: str = ""
    service_account: str = ""
    nodes: int = 1
    gpus_per_node: int = 8
    partition: str = ""
    account: str = ""
    time: str = ""
    processes_per: str = "node"
    setup: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted: type = type(field.default)
            if type(value) is not wanted:
                raise UserError(
                    f"{field.name}: {value!r} is a {type(value).__name__}, wanted {wanted.__name__}"
                )
            if isinstance(value, int) and value < 1:
                raise UserError(f"{field.name}: {value} is not positive")
        if self.processes_per not in ("node", "gpu"):
            raise UserError(f"processes_per: {self.processes_per!r} is neither node nor gpu")

    def need(self, *names: str) -> None:
        """Raises UserError unless these are given."""
        missing = [f"--{name}" for name in names if not getattr(self, name)]
        if missing:
            raise UserError(f"{', '.join(missing)}: not given, neither as a flag nor in the --site file")


def read_site(path: epath.PathLike | None, given: Mapping[str, Any]) -> ClusterConfig:
    """The site of a file, with what was `given` as flags over it.

    Raises:
      UserError: no such file, not YAML, or a key that no site has.
    """
    values: Any = {}
    if path:
        try:
            values = yaml.safe_load(epath.Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
    names = [field.name for field in dataclasses.fields(ClusterConfig)]
    if not isinstance(values, dict) or not set(values) <= set(names):
        found = (
            ", ".join(sorted(map(str, set(values) - set(names))))
            if isinstance(values, dict)
            else repr(values)
        )
        raise UserError(f"{path}: {found}: no key of a site; there are {', '.join(names)}")
    return ClusterConfig(**{**values, **given})


@dataclasses.dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
      run: its name, a DNS label of up to 40 letters: what resources, manifests and logs are called.
      workdir: where it lives; on a cloud, `gs://…`.
      job: the arguments of `python -m lvm.train` beside the workdir.
      commit: the code.
      slice: the accelerators; None on this machine.
      slices: how many such.
      capacity: one of `CAPACITIES`.
      environment: variables and their values, as they are.
      secrets: variable → where its value is kept; the value itself is never read here.
      max_restarts: how often a run that ended by 1, 76 or a signal is started again; after 75 it always is. 0 is never.
      sweep: arguments of each of several runs, beside `job`; () is one run.
      site: see `ClusterConfig`.

    Raises:
      UserError: a name that a cloud would refuse.
    """

    run: str
    workdir: str
    job: tuple[str, ...]
    commit: str = ""
    slice: Slice | None = None
    slices: int = 1
    capacity: str = "on-demand"
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_restarts: int = 3
    sweep: tuple[tuple[str, ...], ...] = ()
    site: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        check_run(self.run)
        for name in (*self.environment, *self.secrets):
            if not VARIABLE.fullmatch(name):
                raise UserError(
                    f"{name!r} is no name of an environment variable; letters, digits and _ make one"
                )
        twice = set(self.environment) & set(self.secrets)
        if twice:
            raise UserError(f"--env and --secret both give {', '.join(sorted(twice))}")
        for text in (self.workdir, *self.job, *sum(self.sweep, ()), *self.environment.values()):
            if "\0" in text:
                raise UserError(f"{text!r}: holds a zero byte, which no argument or variable can")

    @property
    def command(self) -> tuple[str, ...]:
        """What each process runs, after `python`."""
        return ("-m", "lvm.train", *self.job, f"--workdir={self.workdir}")

    @property
    def folder(self) -> str:
        """Where code and files of this run lie beside what it trains."""
        return f"{self.workdir.rstrip('/')}/launch/{self.run}"

    @property
    def archive(self) -> str:
        """The code, as `git archive` writes it."""
        return f"{self.folder}/{self.commit}.tar.gz"


def check_run(run: str) -> None:
    """Raises UserError unless the name can be that of a run."""
    if not _RUN.fullmatch(run):
        raise UserError(
            f"--run: {run!r} is no name of a run; wanted up to 40 small letters, digits and hyphens, "
            "a letter first and no hyphen last"
        )


def pairs(flag: str, given: Sequence[str], whole: bool = False) -> dict[str, str]:
    """`["A=1"]` → `{"A": "1"}`; with `whole`, "A" alone is `{"A": "A"}`.

    Raises:
      UserError: one without "=", or a name given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark and not whole:
            raise UserError(f"--{flag}: {text!r}; wanted NAME=VALUE")
        if name in found:
            raise UserError(f"--{flag}: {name} is given twice")
        found[name] = value if mark else name
    return found


def sweep_of(given: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """`["optimizer.learning_rate=1e-3,3e-4", "seed=0,1"]` → the arguments of each of its runs, four here.

    Raises:
      UserError: one without values.
    """
    axes = []
    for text in given:
        key, mark, values = text.partition("=")
        if not mark or not key or "" in values.split(","):
            raise UserError(f"--sweep: {text!r}; wanted KEY=VALUE,VALUE of the configuration")
        axes.append([f"--config.{key.removeprefix('config.')}={value}" for value in values.split(",")])
    return tuple(itertools.product(*axes)) if axes else ()


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A run that was submitted, as far as looking after it needs.

    Attributes:
      run: its name; "" for all of a site.
      site: see `ClusterConfig`.
      folder: where its files are on this machine; it exists.
      workdir: where it lives.
    """

    run: str
    site: ClusterConfig
    folder: Path
    workdir: str = ""
