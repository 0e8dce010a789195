"""Evaluations in the training loop."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, StoppedError
from lvm.evaluation.figures import Plot
from lvm.training.evaluator import Pictures, Stopping
from lvm.training.task import State


@dataclasses.dataclass
class ContextOfState:
    """The context of a state that is trained: evaluations of one step share their answers."""

    context: Context
    _step: int = -1
    _latest: Context | None = None

    def at(self, state: State, stopping: Stopping) -> Context:
        step = int(state["step"])
        if step != self._step or self._latest is None:
            model = self.context.model.with_params(state["params"], step)
            self._step, self._latest = step, self.context.with_model(model, stopping)
        return self._latest


@dataclasses.dataclass
class TrainingEvaluation:
    """An evaluator as `lvm.training.evaluator.Evaluation`: figures are named `NAME/FIGURE`, pictures `NAME-TITLE`."""

    name: str
    evaluator: Evaluator
    context: ContextOfState

    @property
    def every(self) -> int:
        return self.evaluator.every

    def __call__(self, state: State, stopping: Stopping) -> tuple[dict[str, float], Pictures] | None:
        """See `lvm.training.evaluator.Evaluation`."""
        try:
            figures, pictures = self.evaluator.run(self.context.at(state, stopping))
        except StoppedError:
            return None
        except NotApplicableError as error:
            log_warning(f"{self.name} is skipped: {error}")
            return {}, {}
        except UserError as error:
            raise UserError(f"config.evaluations.{self.name}: {error}") from error
        values = {f"{self.name}/{figure.name}": figure.estimate.value for figure in figures}
        shown = {f"{self.name}-{picture.name}": _pixels(picture.content) for picture in pictures}
        if figures:
            log_info(f"  {self.name}: {figures[0].name} {figures[0].estimate.value:.4f}")
        return {name: value for name, value in values.items() if not math.isnan(value)}, shown


def training_evaluations(evaluations: Mapping[str, Any], context: Context) -> dict[str, TrainingEvaluation]:
    """The evaluations of a run. The context's model has the run's shapes; its weights are replaced by each state's.

    Raises:
      UserError: an evaluation needs images, and the context has no image source.
    """
    with_images = [name for name, evaluator in evaluations.items() if evaluator.needs_images]
    if with_images and context.source is None:
        raise UserError(
            f"config.evaluation_source is empty; {', '.join(with_images)} in config.evaluations need the training "
            "source's images: give its folder or config file"
        )
    shared = ContextOfState(context)
    return {name: TrainingEvaluation(name, evaluator, shared) for name, evaluator in evaluations.items()}


def _pixels(content: Any) -> np.ndarray:
    if not isinstance(content, Plot):
        return content
    from lvm.evaluation.plots import plot_curves  # Matplotlib takes as long as the rest of this module

    return np.asarray(Image.open(io.BytesIO(plot_curves(content))).convert("RGB"))
