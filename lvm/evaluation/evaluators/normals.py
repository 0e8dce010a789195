"""Surface normals by example pairs: angles between predicted and true normals (Fouhey et al., ICCV 2013)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.streams.codecs import Codec, Normals
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.figures import Metric
from lvm.evaluation.prompted import PromptedTask, Statistics

_WITHIN = (11.25, 22.5, 30.0)  # degrees


@dataclasses.dataclass(frozen=True)
class NormalsTask(PromptedTask):
    """Unit vectors as colors. Black pixels of the truth, which face away from the viewer, have no reading."""

    kind = "normals"
    codec_type = Normals

    target: str = "normals"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        return [
            Metric("mean_angle", "mean angle between normals, per image, then averaged", "deg", False),
            *(Metric(f"within_{degrees:g}", f"pixels within {degrees:g}°", "%") for degrees in _WITHIN),
        ]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        normals, expected = (np.stack([codec.parse(x) for x in batch]) for batch in (images, truth))
        mean, shares = metrics.normal_errors(normals, expected, np.any(truth, axis=-1), _WITHIN)
        return {"mean_angle": mean} | {f"within_{d:g}": share for d, share in zip(_WITHIN, shares, strict=True)}
