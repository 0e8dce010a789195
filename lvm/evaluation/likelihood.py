"""Likelihood of held-out sentences, compared with entropies of the same codes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from lvm.common import statistics
from lvm.evaluation import metrics
from lvm.evaluation.figures import Aggregate, Estimate, estimate, mean_of
from lvm.inference.pretrained import LVM

Sentences = Integer[np.ndarray, "_ _ _"]  # [B, G, N]
Losses = Float[np.ndarray, "_ _ _"]  # [B, G, N]
Groups = Integer[np.ndarray, "_ _"]  # hashes [B, G] of the originals of images
_BATCH = 16  # sentences per forward pass


def mean_loss(losses: Losses, groups: Groups, transform: Aggregate = mean_of) -> Estimate:
    """`transform` of the mean loss of codes [B, G, N], its interval over the originals of images [B, G].

    Losses that are NaN, of codes that nothing predicts, are left out. Images in context count as given.
    """
    sums = np.stack([np.nansum(losses, axis=-1, dtype=np.float64), (~np.isnan(losses)).sum(-1)], axis=-1)
    sums[sums[..., 1] == 0] = np.nan
    return estimate(sums.reshape(-1, 2), lambda x: transform(x[:, 0] / x[:, 1]), groups.ravel())


def count_sentences(groups: Groups) -> str:
    """Text such as "128 sentences of 270 originals"."""
    return f"{len(groups)} sentences of {len(np.unique(groups))} originals"


def grid_losses(model: LVM, sentences: Sentences) -> Losses:
    """Negative log-likelihood in nats of each code given all codes before it.

    BOS is prepended if the vocabulary has one; otherwise the first code has no prediction (NaN).
    """
    codes = sentences.reshape(len(sentences), -1)  # [B, G·N]
    bos = model.vocabulary.bos
    tokens = codes if bos is None else np.pad(codes, ((0, 0), (1, 0)), constant_values=bos)
    losses = np.full(codes.shape, np.nan, np.float32)
    for start in range(0, len(tokens), _BATCH):
        batch = tokens[start : start + _BATCH]
        padded = np.pad(batch, ((0, _BATCH - len(batch)), (0, 0)))  # one shape, one compilation
        first = codes.shape[1] - tokens.shape[1] + 1
        losses[start : start + _BATCH, first:] = model.token_losses(padded)[: len(batch)]
    return losses.reshape(sentences.shape)


def mixture_metrics(
    losses: Mapping[str, Losses], sentences: Mapping[str, Sentences], weights: Mapping[str, float], num_codes: int
) -> dict[str, Any]:
    """Weighted mean loss over components and the unigram entropy of the same codes, both in nats per code."""
    total = sum(weights[name] for name in losses)
    by_component = {name: float(np.nanmean(values)) for name, values in losses.items()}
    unigram = np.zeros(num_codes)
    for name in losses:
        counts = np.bincount(sentences[name].ravel(), minlength=num_codes)
        unigram += weights[name] / total * counts / counts.sum()
    loss = sum(weights[name] / total * by_component[name] for name in losses)
    entropy = float(statistics.entropy(unigram))
    return {
        "loss": loss,
        "unigram_entropy": entropy,
        "below_unigram": _relative_reduction(loss, entropy),
        "by_component": by_component,
    }


def video_metrics(
    losses: Losses, videos: Sequence[Integer[np.ndarray, "_ N"]], stride: int, num_codes: int
) -> dict[str, Any]:
    """Loss from the third frame on, against the first frame and H(code | same position of the preceding frame).

    The entropy is estimated on `videos`, whose frames are `stride` apart in a sentence.
    """
    first, later = float(np.nanmean(losses[:, 0])), float(np.mean(losses[:, 2:]))
    before = np.concatenate([video[stride:-stride] for video in videos])  # [transitions, N]
    after = np.concatenate([video[2 * stride :] for video in videos])
    conditional = metrics.conditional_entropy(before, after, num_codes, corrected=True)
    return {
        "loss_first_image": first,
        "loss_from_image_3": later,
        "conditional_entropy": conditional,
        "conditional_entropy_plug_in": metrics.conditional_entropy(before, after, num_codes),
        "num_transitions": int(after.size),
        "below_conditional": _relative_reduction(later, conditional),
        "perplexity_ratio": math.exp(later - first),
    }


def _relative_reduction(loss: float, entropy: float) -> float | None:
    return 1 - loss / entropy if entropy > 0 else None
