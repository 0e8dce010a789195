"""Perplexity of held-out sentences by component, by images in context and by position within the image."""

import dataclasses

import numpy as np

from lvm.common.validation import check_positive
from lvm.data.mixture.mixture import MixtureConfig
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Estimate, Figure, Picture, Plot, estimate
from lvm.evaluation.likelihood import Groups, Losses, count_sentences, mean_loss

_AVERAGES = {"exp_of_mean": "exponential of the mean loss", "mean_of_exp": "mean over sentences, as in the LVM paper"}


@dataclasses.dataclass(frozen=True)
class Perplexity(Evaluator):
    """Per-image perplexity given the preceding images of the sentence, in both averages in use.

    `exp_of_mean` is the exponential of the loss averaged over sentences; `mean_of_exp` the mean over sentences of the
    exponential of a sentence's mean loss, as in the LVM paper (arXiv 2312.00785).

    Attributes:
      num_sentences: of each component.
      data: a mixture whose stores' held-out sentences are measured, all scenes if its `heldout_fraction` is 0; without
        components, the sentences of the training mixture.
    """

    kind = "perplexity"
    needs_images = False

    num_sentences: int = 128
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_sentences")

    def run(self, context: Context) -> Result:
        data = self.data if self.data.components else None
        losses = context.losses(self.num_sentences, data)
        if not losses:
            raise NotApplicableError("no component has held-out sentences that fit the context")
        context.episodes = context.sentence_digests(self.num_sentences, data)
        groups = context.sentence_groups(self.num_sentences, data)
        components = (data or context.mixture).components
        figures = []
        by_image: dict[str, dict[str, list[tuple[float, ...]]]] = {name: {} for name in _AVERAGES}
        by_position = {}
        for name, values in losses.items():
            answers = components[name].recipe.answer_mask
            # A sentence without answers, of a single image, is measured whole.
            is_measured = answers if answers.any() else np.ones_like(answers)
            measured = values[:, is_measured]
            for average, text in _AVERAGES.items():
                perplexity = _perplexity(measured, groups[name][:, is_measured], average)
                text = f"perplexity of the answers of {name}, {text}; {count_sentences(groups[name])}"
                figures.append(Figure(f"{average}/{name}", perplexity, text, "", False))
                # Images to be predicted; in a plain sequence the first one, too.
                shown = [i for i, is_answer in enumerate(answers) if is_answer or (i == 0 and answers[1:].all())]
                each = {i: _perplexity(values[:, [i]], groups[name][:, [i]], average) for i in shown}
                by_image[average][name] = [(float(i), x.value, *(x.interval or ())) for i, x in each.items()]
            by_position[name] = [(float(i + 1), value) for i, value in enumerate(_position_losses(measured))]
        return figures, [
            *(
                Picture(
                    f"Perplexity against context, {average.replace('_', ' ')}",
                    f"Per-image perplexity given the preceding images, {text}; bands are 95 % intervals.",
                    Plot(by_image[average], "images in context", "perplexity of the next image", log_y=True),
                )
                for average, text in _AVERAGES.items()
            ),
            Picture(
                "Loss by position",
                "Mean loss of each code of an answer, in raster order: the first codes decide what the image shows.",
                Plot(by_position, "position within the image", "nats"),
            ),
        ]


def _perplexity(losses: Losses, groups: Groups, average: str) -> Estimate:
    """Perplexity of images [B, G]; `mean_of_exp` of sentences of several originals has no interval."""
    if average == "exp_of_mean":
        return mean_loss(losses, groups, np.exp)
    by_sentence = np.exp(np.nanmean(losses, axis=(1, 2)).astype(np.float64))
    result = estimate(by_sentence, groups=groups[:, 0])
    # A sentence is resampled whole, but shares each original with other sentences.
    return result if (groups == groups[:, :1]).all() else Estimate(result.value)


def _position_losses(losses: Losses) -> list[float]:
    """Mean loss at each position; NaN where nothing predicts the code, as the first one without BOS."""
    predicted = ~np.isnan(losses)
    count = predicted.sum((0, 1))
    return (np.where(predicted, losses, 0).sum((0, 1)) / np.where(count > 0, count, np.nan)).tolist()
