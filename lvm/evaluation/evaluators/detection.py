"""Single-object detection by example pairs, as in visual prompting (github.com/amirbar/visual_prompting)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.data.streams.codecs import PALETTE, Boxes, Codec, nearest_colors
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context
from lvm.evaluation.figures import Metric, Published
from lvm.evaluation.heldout import HeldoutScene
from lvm.evaluation.prompted import PromptedTask, Statistics


@dataclasses.dataclass(frozen=True)
class Detection(PromptedTask):
    """Boxes as filled rectangles. The box of an answer is that of its largest connected region of any class's color.

    Only scenes whose frames all have exactly one box are asked for.

    Attributes:
      max_area: largest share of the image that the box covers.
    """

    kind = "detection"
    codec_type = Boxes

    target: str = "boxes"
    max_area: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_area <= 1:
            raise UserError(f"max_area={self.max_area} must be in (0, 1]")

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        text = "IoU of the boxes, mean over queries (the mIoU of visual prompting)"
        return [Metric("box_iou", text, published=Published(0.4825, "LVM on the first split of Pascal-5i"))]

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        assert isinstance(codec, Boxes)
        colors = PALETTE[: len(codec.names) + 1]
        boxes, expected = (
            [metrics.largest_box(nearest_colors(image, colors) > 0) for image in batch] for batch in (images, truth)
        )
        ious = [0.0 if b is None else metrics.box_iou(a, b) for a, b in zip(boxes, expected, strict=True)]
        return {"box_iou": np.array(ious)}

    def candidates(self, context: Context, queries: Sequence[Query], codec: Codec) -> dict[str, Images]:
        answers = super().candidates(context, queries, codec)
        return answers | {"the whole image": np.broadcast_to(PALETTE[1], answers["copied example"].shape).copy()}

    def is_usable(self, scene: HeldoutScene, codec: Codec) -> bool:
        column = scene.info.streams.index(self.target)
        for image in scene.images[:, column]:
            boxes = codec.parse(image)
            if len(boxes) != 1:
                return False
            box = boxes[0]
            if (box.x1 - box.x0) * (box.y1 - box.y0) > self.max_area * image.shape[0] * image.shape[1]:
                return False
        return True
