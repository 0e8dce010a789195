"""Loss of held-out sentences, compared with entropies of the same codes."""

import dataclasses

import numpy as np

from lvm.common.logging import log_warning
from lvm.common.validation import check_positive
from lvm.data.mixture.recipes import Video
from lvm.evaluation import baselines, likelihood
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Estimate, Figure

_MAX_VIDEOS = 4000  # for the conditional entropy


@dataclasses.dataclass(frozen=True)
class Likelihood(Evaluator):
    """The mixture's loss against the unigram entropy, and that of videos against the preceding frame.

    The loss is that of training: with the mixture's loss on answers, of the codes of answers alone.

    Attributes:
      num_sentences: of each component.
    """

    kind = "likelihood"
    needs_images = False

    num_sentences: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_sentences")

    def run(self, context: Context) -> Result:
        sentences, losses = context.sentences(self.num_sentences), context.losses(self.num_sentences)
        if not sentences:
            raise NotApplicableError("no component of the mixture has held-out sentences that fit the context")
        context.episodes = context.sentence_digests(self.num_sentences)
        groups = context.sentence_groups(self.num_sentences)
        mixture, num_codes = context.mixture, context.model.vocabulary.num_codes
        counted = {name: mixture.components[name].recipe.answer_mask | (mixture.loss == "all") for name in losses}
        weights = {n: mixture.code_weight(mixture.components[n]) * float(mask.mean()) for n, mask in counted.items()}
        counted_losses = {name: losses[name][:, mask] for name, mask in counted.items()}
        counted_codes = {name: sentences[name][:, mask] for name, mask in counted.items()}
        m = likelihood.mixture_metrics(counted_losses, counted_codes, weights, num_codes)
        unigram = {"unigram entropy of the same codes": Estimate(m["unigram_entropy"])}
        text = f"next-token loss, weighted as in training; {_below(m['below_unigram'])} the unigram entropy"
        figures = [Figure("loss", Estimate(m["loss"]), text, "nats", False, unigram)]
        for name, values in counted_losses.items():
            loss = likelihood.mean_loss(values, groups[name][:, counted[name]])
            text = f"next-token loss of {name}, mean over {likelihood.count_sentences(groups[name])}"
            figures.append(Figure(f"loss/{name}", loss, text, "nats", False))
        for name, component in mixture.components.items():
            if isinstance(component.recipe, Video) and name in losses and losses[name].shape[1] > 2:
                figures += _video_figures(context, name, component.recipe, losses[name], groups[name])
        return figures, []


def _video_figures(context: Context, name: str, recipe: Video, losses: np.ndarray, groups: np.ndarray) -> list[Figure]:
    paths = context.mixture.stores_of(context.mixture.components[name])
    stores = baselines.training_stores(context, paths)
    videos: list[np.ndarray] = []
    for store in stores:
        videos += store.videos(recipe.stream, recipe.min_frames, _MAX_VIDEOS - len(videos))
    if not videos and context.source is not None:
        # Few transitions bias the estimate low.
        log_warning(
            f"{', '.join(paths)}: not the training store; the conditional entropy is estimated on held-out videos alone"
        )
        scenes = context.heldout.with_streams([recipe.stream], recipe.min_frames)
        videos = [scene.codes[:, scene.info.streams.index(recipe.stream)] for scene in scenes]
    m = likelihood.video_metrics(losses, videos, min(recipe.strides), context.model.vocabulary.num_codes)
    entropies = {
        "entropy given the same position of the preceding frame": Estimate(m["conditional_entropy"]),
        "its plug-in estimate": Estimate(m["conditional_entropy_plug_in"]),
    }
    later = dataclasses.replace(likelihood.mean_loss(losses[:, 2:], groups[:, 2:]), value=m["loss_from_image_3"])
    text = (
        f"loss of {name} from image 3 on; {_below(m['below_conditional'])} the entropy, which is of "
        f"{m['num_transitions']:,} codes"
    )
    ratio = Estimate(m["perplexity_ratio"])
    return [
        Figure(f"video_loss/{name}", later, text, "nats", False, entropies),
        Figure(f"video_first_loss/{name}", Estimate(m["loss_first_image"]), "loss of the first image", "nats", False),
        Figure(f"video_perplexity_ratio/{name}", ratio, "perplexity from image 3 on, by the first image's", "x", False),
    ]


def _below(share: float | None) -> str:
    if share is None:
        return "not comparable with"
    return f"{abs(share):.1%} {'below' if share >= 0 else 'above'}"
