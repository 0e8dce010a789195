"""Keypoints by example pairs: PCK, the percentage of correct keypoints (Yang and Ramanan, PAMI 2013)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common.validation import check_positive
from lvm.data.streams.codecs import Codec, Pose
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.figures import Metric
from lvm.evaluation.heldout import HeldoutScene
from lvm.evaluation.prompted import PromptedTask, Statistics


@dataclasses.dataclass(frozen=True)
class Keypoints(PromptedTask):
    """Skeletons with joints as colored discs.

    Only scenes of one person are asked for: an image doesn't tell which joints belong to whom.

    Attributes:
      alpha: distance of a correct keypoint, a fraction of the longer side of the box around all true ones.
    """

    kind = "keypoints"
    codec_type = Pose

    target: str = "pose"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "alpha")

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        text = f"PCK@{self.alpha:g}: true keypoints with an answer within {self.alpha:g} of the person's size"
        precision = "answered keypoints that are correct"
        return [Metric("pck", text, "%"), Metric("precision", precision, "%")]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        pairs = zip(images, truth, strict=True)
        shares = [metrics.keypoint_shares(codec.parse(a), codec.parse(b), self.alpha) for a, b in pairs]
        pck, precision = np.array(shares).T
        return {"pck": pck, "precision": precision}

    def is_usable(self, scene: HeldoutScene, codec: Codec) -> bool:
        column = scene.info.streams.index(self.target)
        return all(max(map(len, codec.parse(image))) == 1 for image in scene.images[:, column])
