"""Segmentation by example pairs: foreground IoU in both definitions in use, and class mIoU."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.data.streams.codecs import PALETTE, Codec, Palette
from lvm.evaluation import metrics
from lvm.evaluation.episodes import Images, Query
from lvm.evaluation.evaluator import Context
from lvm.evaluation.figures import Estimate, Metric, Published
from lvm.evaluation.prompted import PromptedTask, Statistics

_CHANCE_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Segmentation(PromptedTask):
    """Class ids as colors; an answer is read as the nearest color of the palette.

    `foreground_iou` is the mean over queries of the foreground's IoU, the "mIoU" of visual prompting
    (github.com/amirbar/visual_prompting); void pixels are background. `foreground_miou` is that of few-shot
    segmentation: intersections and unions are summed over the queries of a class, then classes are averaged.
    `class_miou` is that of semantic segmentation, from the pixels of all queries without void and background.
    """

    kind = "segmentation"
    codec_type = Palette
    also_plotted = ("class_miou",)

    target: str = "segmentation"

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        assert isinstance(codec, Palette)
        exclude = [] if codec.background is None else [codec.background]
        by_class = [
            Metric("class_miou", "class mIoU over the pixels of all queries", "", True,
                   lambda counts: metrics.mean_iou(counts, exclude)),
            Metric("pixel_accuracy", "pixel accuracy", "%", True, metrics.accuracy),
        ]  # fmt: skip
        if codec.background is None:
            return by_class
        return [
            Metric("foreground_iou", "foreground IoU, mean over queries (the mIoU of visual prompting)",
                   published=Published(0.4968, "LVM on Pascal-5i, mean of its four splits")),
            Metric("foreground_miou", "foreground mIoU of few-shot segmentation, summed by class", "",
                   True, metrics.mean_of_ratios),
            *by_class,
        ]  # fmt: skip

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        assert isinstance(codec, Palette)
        labels, expected = (np.stack([codec.parse(x) for x in batch]) for batch in (images, truth))
        pairs = zip(labels, expected, strict=True)
        counts = np.stack([metrics.class_counts(a, b, len(codec.names), codec.ignore) for a, b in pairs])
        scores = {"class_miou": counts, "pixel_accuracy": counts}
        if codec.background is None:
            return scores
        masks, foreground = (metrics.foreground(x, codec.background, codec.ignore) for x in (labels, expected))
        names = [self.summed_by(query) for query in queries]
        classes = sorted(set(names))
        ratios = np.zeros((len(queries), len(classes), 2))
        index = [classes.index(name) for name in names]
        ratios[np.arange(len(queries)), index] = np.stack(
            [(masks & foreground).sum((1, 2)), (masks | foreground).sum((1, 2))], axis=1
        )
        return scores | {"foreground_iou": metrics.iou(masks, foreground), "foreground_miou": ratios}

    def summed_by(self, query: Query) -> str:
        """The class, over whose queries `foreground_miou` sums."""
        return query.scene.info.class_name

    def candidates(self, context: Context, queries: Sequence[Query], codec: Codec) -> dict[str, Images]:
        assert isinstance(codec, Palette)
        answers = super().candidates(context, queries, codec)
        if codec.background is None:
            return answers
        shape = answers["copied example"].shape
        colors = [i for i in codec.used_ids.tolist() if i not in (codec.background, codec.ignore)]
        return answers | {"all foreground": np.broadcast_to(PALETTE[colors[0]], shape).copy()}

    def chance(self, codec: Codec, images: Images, truth: Images) -> dict[str, dict[str, Estimate]]:
        """Class mIoU with the classes of each answer permuted at random."""
        assert isinstance(codec, Palette)
        exclude = [] if codec.background is None else [codec.background]
        if len(set(codec.used_ids.tolist()) - {*exclude, codec.ignore}) < 2:
            return {}  # nothing to permute
        labels, expected = (np.stack([codec.parse(x) for x in batch]) for batch in (images, truth))
        chance = chance_miou(labels, expected, codec, exclude)
        return {"class_miou": {"the same shapes, classes shuffled": Estimate(chance)}}


def chance_miou(labels: np.ndarray, truth: np.ndarray, codec: Palette, exclude: Sequence[int]) -> float:
    """Mean class mIoU when the classes of each answer are permuted at random, [B, H, W] class ids."""
    rng = np.random.default_rng(0)
    classes = np.array([i for i in codec.used_ids.tolist() if i not in exclude], np.uint8)
    scores = []
    for _ in range(_CHANCE_REPEATS):
        permuted = np.empty_like(labels)
        for image, out in zip(labels, permuted, strict=True):
            table = np.arange(256, dtype=np.uint8)
            table[classes] = rng.permutation(classes)
            out[:] = table[image]
        counts = metrics.class_counts(permuted, truth, len(codec.names), codec.ignore)
        scores.append(metrics.mean_iou(counts, exclude))
    return float(np.mean(scores))
