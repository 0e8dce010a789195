"""How well a model predicts held-out sentences, beside what simple statistics of the same codes give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvm.evaluation import metrics
from lvm.inference.pretrained import LVM

_BATCH = 16  # sentences a forward pass


def grid_losses(model: LVM, sentences: np.ndarray) -> np.ndarray:
    """Negative log-likelihood in nats of each code given all before it.

    Args:
      model: is given BOS first where its vocabulary has one; else the first code has no prediction (NaN).
      sentences: int [count, grids, N].

    Returns:
      float32 [count, grids, N].
    """
    count = len(sentences)
    codes = sentences.reshape(count, -1)  # [count, grids·N]
    bos = model.vocabulary.bos
    losses = np.full(codes.shape, np.nan, np.float32)
    for start in range(0, count, _BATCH):
        part = codes[start : start + _BATCH]
        inputs = part[:, :-1] if bos is None else np.pad(part[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
        padded = np.pad(inputs, ((0, _BATCH - len(part)), (0, 0)))  # one shape, one compile
        logits = model.logits(padded)[: len(part)].astype(np.float64)  # [B, T, V]
        targets = part if bos is not None else part[:, 1:]
        top = logits.max(-1, keepdims=True)
        normalizer = np.log(np.sum(np.exp(logits - top), -1)) + top[..., 0]  # [B, T]
        chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        losses[start : start + len(part), part.shape[1] - targets.shape[1] :] = normalizer - chosen
    return losses.reshape(sentences.shape)


def mixture_metrics(
    losses: Mapping[str, np.ndarray],
    sentences: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    num_codes: int,
) -> dict[str, Any]:
    """The weighted mean loss of several sources beside the unigram entropy of the same codes, in nats a code."""
    total = sum(weights[name] for name in losses)
    loss = sum(weights[name] / total * float(np.nanmean(losses[name])) for name in losses)
    shares = np.zeros(num_codes)
    for name in losses:
        counts = np.bincount(sentences[name].ravel(), minlength=num_codes)
        shares += weights[name] / total * counts / counts.sum()
    unigram = metrics.entropy(shares)
    by_component = {name: float(np.nanmean(losses[name])) for name in losses}
    return {
        "loss": loss,
        "unigram_entropy": unigram,
        "below_unigram": _below(loss, unigram),
        "by_component": by_component,
    }


def perplexity_by_image(losses: np.ndarray) -> dict[str, list[float]]:
    """Perplexity of the 1st, 2nd … image of a sentence, from losses [count, grids, N].

    `exp_of_mean` is exp of the mean loss; `mean_of_exp` is the mean over sentences of exp of their mean loss, which is
    what LVM reports.
    """
    by_sentence = np.nanmean(losses, axis=2)  # [count, grids]
    return {
        "exp_of_mean": np.exp(by_sentence.mean(0)).tolist(),
        "mean_of_exp": np.exp(by_sentence).mean(0).tolist(),
    }


def video_metrics(
    losses: np.ndarray, videos: Sequence[np.ndarray], stride: int, num_codes: int
) -> dict[str, Any]:
    """Later frames beside the first, and beside H(code | same position of the frame before).

    Args:
      losses: [count, frames, N].
      videos: codes int [T, N] of each video that the entropy is counted on.
      stride: frames from one image of a sentence to the next.
      num_codes: size of the codebook.
    """
    later = float(np.mean(losses[:, 2:]))
    before = np.concatenate([video[stride:-stride] for video in videos])  # [transitions, N]
    after = np.concatenate([video[2 * stride :] for video in videos])
    conditional = metrics.conditional_entropy(before, after, num_codes, corrected=True)
    return {
        "loss_first_image": float(np.nanmean(losses[:, 0])),
        "loss_from_image_3": later,
        "conditional_entropy": conditional,
        "conditional_entropy_plug_in": metrics.conditional_entropy(before, after, num_codes),
        "num_transitions": int(after.size),
        "below_conditional": _below(later, conditional),
        "perplexity_ratio": math.exp(later - float(np.nanmean(losses[:, 0]))),
    }


def _below(loss: float, entropy: float) -> float | None:
    """By which share a loss lies below an entropy; None where there is nothing to know."""
    return 1 - loss / entropy if entropy > 0 else None
