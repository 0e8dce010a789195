"""Segmentation by a rule that changes from prompt to prompt, such as the palette: the examples tell it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.common.validation import check_tuples
from lvm.data.streams.codecs import Codec, Palette
from lvm.evaluation import baselines
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context, NotApplicableError
from lvm.evaluation.evaluators.segmentation import Segmentation
from lvm.evaluation.figures import Metric


@dataclasses.dataclass(frozen=True)
class VaryingSegmentation(Segmentation):
    """Query i and its examples are annotated by stream i modulo the number of `targets`.

    Metrics are `Segmentation`'s, of colors: `class_miou`, the first, is over colors, whichever classes have them in a
    prompt, and `foreground_miou` is summed by stream. Baselines are by the rule of the prompt.

    Attributes:
      targets: streams of palettes with equally many colors.
    """

    kind = "varying_segmentation"

    target: str = dataclasses.field(default="", init=False)  # the first of `targets`, whose name stands for all
    targets: tuple[str, ...] = ("segmentation", "segmentation_1")

    def __post_init__(self) -> None:
        check_tuples(self, "targets")
        if len(self.targets) < 2 or len({self.input, *self.targets}) <= len(self.targets):
            raise UserError(f"targets={self.targets} must be two streams or more, each once, without {self.input!r}")
        object.__setattr__(self, "target", self.targets[0])
        super().__post_init__()

    @property
    def title(self) -> str:
        return f"one of {len(self.targets)} rules"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        metrics = sorted(super().metrics(codec), key=lambda metric: metric.name != "class_miou")
        return [
            dataclasses.replace(metric, text="foreground mIoU, summed by the stream of the annotation")
            if metric.name == "foreground_miou"
            else metric
            for metric in metrics
        ]

    def summed_by(self, query: Query) -> str:
        return query.shown

    def streams(self, context: Context) -> Sequence[str]:
        return (self.input, *self.targets)

    def queries(self, context: Context) -> list[Query]:
        """The queries, each showing its stream of `targets` as the first of these."""
        queries, first = super().queries(context), self.codec(context)
        for target in self.targets:
            if _colors(context.heldout.codecs[target]) != _colors(first):
                raise NotApplicableError(f"the stream {target} is not a palette of the same colors as {self.target}")
        return [query.showing(self.targets[i % len(self.targets)], self.target) for i, query in enumerate(queries)]

    def pictured(self, queries: Sequence[Query]) -> Sequence[int]:
        """The first query by each rule."""
        return range(min(len(self.targets), len(queries)))

    def candidates(self, context: Context, queries: Sequence[Query], codec: Codec) -> dict[str, Images]:
        answers = super().candidates(context, queries, codec)
        means = self._by_rule(queries, lambda asked, _: baselines.mean_image(asked, self.target))
        return answers if means is None else answers | {"mean image": means}

    def neighbors(self, context: Context, queries: Sequence[Query]) -> Images | None:
        return self._by_rule(
            queries, lambda asked, stream: baselines.nearest_neighbor(context, asked, self.input, stream)
        )

    def _by_rule(
        self, queries: Sequence[Query], answer: Callable[[Sequence[Query], str], Images | None]
    ) -> Images | None:
        """The answers to all queries from those to the queries by each rule; None if one has none."""
        by_rule: dict[int, Images] = {}
        for stream in self.targets:
            rows = [i for i, query in enumerate(queries) if (query.shown or self.target) == stream]
            answers = answer([queries[i] for i in rows], stream) if rows else np.empty(0)
            if answers is None:
                return None
            by_rule |= dict(zip(rows, answers, strict=True))
        return np.stack([by_rule[i] for i in range(len(queries))])


def _colors(codec: Codec) -> tuple[int, int | None, int | None] | None:
    return (len(codec.names), codec.background, codec.ignore) if isinstance(codec, Palette) else None
