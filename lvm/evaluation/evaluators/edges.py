"""Edges by example pairs: ODS and OIS F-measure of the Berkeley benchmark."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common.validation import check_positive
from lvm.data.streams.codecs import Codec, Edges
from lvm.evaluation import edge_metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context, NotApplicableError
from lvm.evaluation.figures import Metric
from lvm.evaluation.prompted import PromptedTask, Statistics


@dataclasses.dataclass(frozen=True)
class EdgesTask(PromptedTask):
    """Edge strength as white on black.

    Attributes:
      thresholds: of edge strength, equidistant in (0, 1).
      tolerance: distance of matched pixels, a fraction of the diagonal.
    """

    kind = "edges"
    codec_type = Edges

    target: str = "edges"
    thresholds: int = edge_metrics.THRESHOLDS
    tolerance: float = edge_metrics.TOLERANCE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "thresholds", "tolerance")

    def queries(self, context: Context) -> list[Query]:
        """The queries. Raises NotApplicableError if none of them has a true edge, as when they were scaled away."""
        queries, codec = super().queries(context), self.codec(context)
        truth = [query.scene.image(query.frame, self.target) for query in queries]
        if not any(edge_metrics.true_edges(codec.parse(image)).any() for image in truth):
            height, width = truth[0].shape[:2]
            raise NotApplicableError(
                f"no edge of the {len(queries)} queries has a strength of {edge_metrics.TRUE_STRENGTH} or more at "
                f"{height}×{width}, the tokenizer's resolution"
            )
        return queries

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        of = f"F-measure of edges within {self.tolerance:g} of the diagonal, {self.thresholds} thresholds"
        return [
            Metric("ods", f"ODS {of}: one for all images", aggregate=edge_metrics.ods),
            Metric("ois", f"OIS {of}: the best of each image", aggregate=edge_metrics.ois),
        ]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        strengths, expected = ([codec.parse(x) for x in batch] for batch in (images, truth))
        counts = [
            edge_metrics.edge_counts(strength, edge_metrics.true_edges(edges), self.thresholds, self.tolerance)
            for strength, edges in zip(strengths, expected, strict=True)
        ]
        return {"ods": np.stack(counts), "ois": np.stack([edge_metrics.best_counts(x) for x in counts])}
