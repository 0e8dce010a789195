"""Curves of the loss logged during training, of the model and its tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Picture, Plot
from lvm.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Curves(Evaluator):
    """Metrics of the runs that trained the model and the tokenizer, against steps.

    Attributes:
      metrics: names in `metrics.jsonl`.
    """

    kind = "curves"
    needs_images = False

    metrics: tuple[str, ...] = ("loss", "heldout_loss")

    def run(self, context: Context) -> Result:
        pictures = []
        for name, folder in context.folders.items():
            records = read_metrics(folder)
            curves = {key: points for key in self.metrics if (points := metric_curve(records, key))}
            if curves:
                plot = Plot(curves, "step", "loss")
                pictures.append(Picture(f"Loss of the {name}", "Logged during training.", plot))
        if not pictures:
            raise NotApplicableError("the folders of the model and the tokenizer have no metrics of training")
        return [], pictures


def metric_curve(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, ...]]:
    """(step, value) of the records of a `metrics.jsonl` that have the key."""
    return [(float(record["step"]), float(record[key])) for record in records if key in record]
