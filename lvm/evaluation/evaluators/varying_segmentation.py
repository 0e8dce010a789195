"""Segmentation by a rule that changes from prompt to prompt, such as the palette: the examples alone tell it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_tuples
from lvm.data.streams.codecs import Codec, Palette
from lvm.evaluation import baselines
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context, NotApplicableError
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.figures import Metric

_SCORES = ("foreground_iou", "foreground_miou", "class_miou", "pixel_accuracy")


@dataclasses.dataclass(frozen=True)
class VaryingSegmentation(Segmentation):
    """Query i and its examples are annotated by stream i modulo the number of `targets`.

    Metrics are `Segmentation`'s, of colors: `class_miou` is over colors, whichever classes have them in a prompt.

    Attributes:
      targets: streams of palettes with equally many colors.
      score_by: the metric that comes first and is plotted. Where most answers are empty, as of masks of one class of
        several, `foreground_miou` is the one that empty answers don't decide.
    """

    kind = "varying_segmentation"

    target: str = ""  # taken from `targets`
    targets: tuple[str, ...] = ("segmentation", "segmentation_1")
    score_by: str = "class_miou"

    def __post_init__(self) -> None:
        check_tuples(self, "targets")
        check_choice(self, "score_by", _SCORES)
        if len(set(self.targets)) < max(2, len(self.targets)) or self.target not in ("", self.targets[0]):
            raise UserError(f"targets={self.targets} must be two streams or more, each once; target is the first")
        object.__setattr__(self, "target", self.targets[0])
        super().__post_init__()
        if self.input in self.targets:
            raise UserError(f"targets={self.targets} must not have input={self.input!r}")

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        return sorted(super().metrics(codec), key=lambda metric: metric.name != self.score_by)

    def streams(self, context: Context) -> Sequence[str]:
        return (self.input, *self.targets)

    def queries(self, context: Context) -> list[Query]:
        """The queries, each showing its stream of `targets` as the first of these."""
        first = self.codec(context)
        for target in self.targets:
            codec = context.heldout.codecs.get(target)
            if codec is not None and _colors(codec) != _colors(first):
                raise NotApplicableError(f"the stream {target} is not a palette of the same colors as {self.target}")
        queries = super().queries(context)
        return [query.showing(self.targets[i % len(self.targets)], self.target) for i, query in enumerate(queries)]

    def candidates(self, context: Context, queries: Sequence[Query], codec: Codec) -> dict[str, Images]:
        """Baselines; the nearest neighbor's answer is by the rule of the prompt."""
        answers = super().candidates(context, queries, codec)
        answers.pop("nearest training neighbor", None)
        by_target: dict[str, list[int]] = {}
        for i, query in enumerate(queries):
            by_target.setdefault(query.shown, []).append(i)
        nearest = np.empty_like(answers["copied example"])
        for target, rows in by_target.items():
            neighbors = baselines.nearest_neighbor(context, [queries[i] for i in rows], self.input, target)
            if neighbors is None:
                return answers
            nearest[rows] = neighbors
        return answers | {"nearest training neighbor": nearest}


def _colors(codec: Codec) -> tuple[int, int | None, int | None] | None:
    return (len(codec.names), codec.background, codec.ignore) if isinstance(codec, Palette) else None
