"""Manifest of a sweep, `sweep.json`: its runs, each an ordinary workdir of training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive

MANIFEST = "sweep.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
      name: unique.
      workdir: relative to the manifest's folder, or absolute.
      params, params_without_embedding: parameters with and without embedding and output projection.
      tokens: trained on, in all `steps`.
      flops: of the whole training, attention and output projection included.
      steps: of the whole training.
      evaluation: output folder of `lvm evaluate`, relative like `workdir`; "" for none.
      arguments: of `lvm train`, besides the workdir.
      evaluation_arguments: of `lvm evaluate`, besides model and output folder.
      budget: FLOPs that were planned for; 0 for none.
      batch_size: rows a step.
      learning_rate: the peak.
      mesh: axes larger than 1, such as "data 4 × fsdp 2".
      micro_batches: a step.
      epochs: passes over the training split.
      device_hours: of the steps that the run trains itself; 0 if unknown.
      trunk, trunk_step: run whose checkpoint of that step this run begins with; "" and 0 for none.
    """

    name: str
    workdir: str
    params: float
    params_without_embedding: float
    tokens: float
    flops: float
    steps: int
    evaluation: str = ""
    arguments: tuple[str, ...] = ()
    evaluation_arguments: tuple[str, ...] = ()
    budget: float = 0.0
    batch_size: int = 0
    learning_rate: float = 0.0
    warmup_steps: int = 0
    mesh: str = ""
    micro_batches: int = 1
    epochs: float = 0.0
    device_hours: float = 0.0
    trunk: str = ""
    trunk_step: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "params", "params_without_embedding", "tokens", "flops", "steps")
        check_non_negative(self, "trunk_step")
        if self.trunk_step >= self.steps:
            raise UserError(f"trunk_step={self.trunk_step} must be below steps={self.steps}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The content of a manifest.

    Attributes:
      format: version of the manifest.
      runs: in the order in which they are to be trained.
      warnings: of the plan.
    """

    format: int
    runs: tuple[Run, ...]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"format={self.format} must be {FORMAT}")
        names = [run.name for run in self.runs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"runs: {repeated[0]!r} is the name of {names.count(repeated[0])} runs")
        for run in self.runs:
            if run.trunk and run.trunk not in names:
                raise UserError(f"runs: {run.name} has trunk={run.trunk!r}, which is no run")

    def tasks(self) -> list[tuple[Run, ...]]:
        """Runs of each task of a job array: a run, and those that branch off it."""
        branches: dict[str, list[Run]] = {}
        for run in self.runs:
            branches.setdefault(run.trunk or run.name, []).append(run)
        return [tuple(sorted(group, key=lambda run: bool(run.trunk))) for group in branches.values()]


def write_sweep(folder: epath.PathLike, sweep: Sweep) -> None:
    """Writes the manifest of a sweep's folder, which is created unless it exists."""
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    files.write_json(epath.Path(folder) / MANIFEST, to_json(sweep))


def read_sweep(folder: epath.PathLike) -> Sweep:
    """Reads the manifest of a sweep's folder.

    Raises:
      UserError: no manifest, an unknown key, a missing one or an impossible value.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        raise UserError(f"--sweep={folder}: no {MANIFEST} in this folder; `lvm sweep plan` writes it")
    value: Any = files.read_json(path)
    if not isinstance(value, Mapping) or not isinstance(value.get("runs"), list):
        raise UserError(f"{path}: expected a JSON object with a list of runs")
    return from_config_dict(Sweep, value, str(path))
