"""The contract between configurations, the training loop and evaluations, which are defined in `lvm.evaluation`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from lvm.common.validation import check_non_negative
from lvm.training.task import State

_PACKAGE = "lvm.evaluation.evaluators"
Stopping = Callable[[], bool]
Pictures = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]


class _Kinds(Mapping[str, type]):
    """Evaluators by kind: KIND is the module `lvm.evaluation.evaluators.KIND`, imported when a configuration names it.

    By name, since that package is above this one: whoever reads a training configuration reads its evaluations.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def add(self, evaluator: type) -> None:
        self._classes[evaluator.kind] = evaluator  # type: ignore[attr-defined]

    def __getitem__(self, kind: str) -> type:
        if kind not in self._classes and kind in set(self):
            importlib.import_module(f"{_PACKAGE}.{kind}")
        return self._classes[kind]

    def __iter__(self) -> Iterator[str]:
        modules = pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__)
        return iter({*self._classes, *(module.name for module in modules)})

    def __len__(self) -> int:
        return len(set(self))


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """Base of evaluators, a family of dataclasses selected by `kind` (`lvm.evaluation.evaluator.Evaluator`).

    Attributes:
      every: interval in training, in steps; 0 evaluates after the last step alone. `lvm evaluate` doesn't use it.
    """

    kind: ClassVar[str]
    kinds: ClassVar[_Kinds] = _Kinds()

    every: int = 0

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            EvaluatorConfig.kinds.add(cls)

    def __post_init__(self) -> None:
        check_non_negative(self, "every")


@runtime_checkable
class Evaluation(Protocol):
    """An evaluation in the training loop. All processes call it alike."""

    @property
    def every(self) -> int:
        """Interval in steps; 0 evaluates after the last step alone."""

    def __call__(self, state: State, stopping: Stopping) -> tuple[dict[str, float], Pictures] | None:
        """Returns figures and pictures by name; None once `stopping()`, which is called equally often everywhere."""


Evaluations = Mapping[str, Any]  # name → Evaluation
