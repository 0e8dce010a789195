"""Depth by example pairs: RMSE, AbsRel and δ1 per image, then averaged (Painter, arXiv 2212.02499)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.streams.codecs import Codec, Depth
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.figures import Metric
from lvm.evaluation.prompted import PromptedTask, Statistics

_SCALED = " after median scaling"


@dataclasses.dataclass(frozen=True)
class DepthTask(PromptedTask):
    """Depth in the codec's unit; figures named `…_scaled` are after median scaling, the others without."""

    kind = "depth"
    codec_type = Depth

    target: str = "depth"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        assert isinstance(codec, Depth)
        return [
            Metric(name + suffix, text + scaled, unit, better)
            for suffix, scaled in (("", ""), ("_scaled", _SCALED))
            for name, text, unit, better in (
                ("abs_rel", "AbsRel, mean of |error| / depth", "", False),
                ("rmse", f"RMSE in {codec.unit}", "", False),
                ("delta1", "δ1, pixels within a factor of 1.25", "%", True),
            )
        ]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        depth, expected = (np.stack([codec.parse(x) for x in batch]) for batch in (images, truth))
        scores = metrics.depth_errors(depth, expected)
        scaled = metrics.depth_errors(depth, expected, scaled=True)
        return scores | {f"{name}_scaled": values for name, values in scaled.items()}
