"""Reconstruction of held-out images by the tokenizer: PSNR, round trip of segmentations, codebook usage."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common import statistics
from lvm.data.streams.codecs import Palette
from lvm.evaluation import metrics
from lvm.evaluation.evaluator import Context, Evaluator, Result
from lvm.evaluation.figures import Estimate, Figure, Picture, estimate, format_count
from lvm.inference.contact_sheet import Cell, render_sheet

_MAX_SCENES = 8  # in the picture


@dataclasses.dataclass(frozen=True)
class Reconstruction(Evaluator):
    """Images encoded and decoded: the tokenizer's loss, an upper limit of all answers."""

    kind = "reconstruction"

    def run(self, context: Context) -> Result:
        heldout, num_codes = context.heldout, context.tokenizer.num_codes
        context.episodes = [scene.info.key for scene in heldout.scenes]
        figures: list[Figure] = []
        histogram = np.zeros(num_codes, np.int64)
        rows = []
        for stream, codec in heldout.codecs.items():
            scenes = heldout.with_streams([stream])
            if not scenes:
                continue
            images, codes = heldout.images(stream), heldout.codes(stream)
            parts = [context.tokenizer.decode(codes[batch]) for batch in context.batches(len(codes), stream)]
            decoded = np.concatenate(parts)
            histogram += np.bincount(codes.ravel(), minlength=num_codes)
            groups = heldout.groups(stream)
            psnr = estimate(statistics.psnr(decoded, images), groups=groups)
            figures.append(
                Figure(
                    f"psnr/{stream}",
                    psnr,
                    f"reconstruction of {stream}, mean over {format_count('images', groups)}",
                    "dB",
                )
            )
            if isinstance(codec, Palette):
                figures += _round_trip(stream, codec, decoded, images, groups)
            rows.append([Cell(scene.image(0, stream), stream) for scene in scenes[:_MAX_SCENES]])
            first = np.stack([scene.grid(0, stream) for scene in scenes[:_MAX_SCENES]])
            rows.append([Cell(image, "decoded") for image in context.tokenizer.decode(first)])
        usage = float(np.count_nonzero(histogram) / num_codes)
        text = f"codes that occur among {histogram.sum():,}, of {num_codes}"
        figures.append(Figure("codebook_usage", Estimate(usage), text, "%"))
        perplexity = Estimate(float(statistics.perplexity(histogram)))
        figures.append(Figure("codebook_perplexity", perplexity, "perplexity of the same codes", "count", None))
        text = "Held-out images above their reconstructions by the tokenizer."
        return figures, [Picture("Reconstructions", text, render_sheet(rows, side=80))]


def _round_trip(
    stream: str, codec: Palette, decoded: np.ndarray, images: np.ndarray, groups: Sequence[str]
) -> list[Figure]:
    labels, truth = (np.stack([codec.parse(x) for x in batch]) for batch in (decoded, images))
    accuracy = estimate(np.mean(labels == truth, axis=(1, 2)), groups=groups)
    figures = [Figure(f"pixel_accuracy/{stream}", accuracy, f"pixel accuracy of {stream} after decoding", "%")]
    if codec.background is not None:
        masks = (metrics.foreground(x, codec.background, codec.ignore) for x in (labels, truth))
        iou = estimate(metrics.iou(*masks), groups=groups)
        figures.append(Figure(f"foreground_iou/{stream}", iou, f"foreground IoU of {stream} after decoding"))
    return figures
